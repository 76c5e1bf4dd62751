"""The server behind its page: what it answers, to whom, and what hostile clients cannot do."""

from __future__ import annotations

import itertools
import json
import socket
import subprocess
import sys
import time

import numpy as np
import pytest
from starlette.websockets import WebSocketDisconnect

from aadkern_train.cli import main
from aadkern_train.serve import people
from aadkern_train.serve.command import listen
from aadkern_train.serve.options import ServeSettings
from aadkern_train.serve.people import WAITING_CHUNKS, WAITING_WORDS, Outbox
from aadkern_train.serve.protocol import LONGEST_COMMAND, BadMessage, Direction, Pause, Prompt, read_message
from aadkern_train.serve.turns import Session, Start, Turns
from tests.serve.serve_models import FRAMES, DotModel, Page, client_of, dot_at, dot_frame, dot_server, running


@pytest.fixture
def client():
    with client_of(dot_server()) as client:
        yield client


# A stream and its commands


def test_a_direction_shows_from_the_chunk_that_the_answer_names(client):
    with client.websocket_connect("/stream") as socket:
        page = Page(socket)
        hello = page.until("hello")
        assert (hello["width"], hello["height"], hello["chunk"], hello["directions"]) == (16, 16, FRAMES, True)
        page.until("seat")
        page.chunk(3)
        answer = page.ask("direction", x=0, y=-1)
        assert answer["kind"] == "ack" and answer["chunk"] > max(page.chunks) - 1
        page.chunk(answer["chunk"] + 2)
        for number, (head, frames) in page.chunks.items():
            step = (0, -1) if number >= answer["chunk"] else (1, 0)
            places = [dot_at(frame) for frame in frames]
            moves = [((b[0] - a[0] + 8) % 16 - 8, (b[1] - a[1] + 8) % 16 - 8) for a, b in itertools.pairwise(places)]
            assert moves == [step] * (FRAMES - 1) and head["prompt"] == f"{step[0]} {step[1]}", number


def test_the_same_seed_gives_the_same_pixels_and_another_does_not(client):
    with client.websocket_connect("/stream") as socket:
        page, begun = Page(socket), []
        for seed in (7, 7, 8):
            first = page.ask("reset", seed=seed)["chunk"]
            begun.append([page.chunk(first + i)[1] for i in range(2)])
            assert page.chunks[first][0]["seed"] == seed and page.chunks[first][0]["place"]["frame"] == FRAMES
    assert np.array_equal(begun[0], begun[1]) and not np.array_equal(begun[0], begun[2])
    assert np.array_equal(begun[0][1][2], dot_frame(7, 6, 7, 0, 16))


def test_pause_rests_and_reset_goes_on(client):
    with client.websocket_connect("/stream") as socket:
        page = Page(socket)
        page.chunk(2)
        last = page.ask("pause", paused=True)["chunk"] - 1
        time.sleep(0.5)  # 7 chunks' time
        page.ask("pace", fps=50)
        assert max(page.chunks) <= last, "chunks after a pause"
        again = page.ask("reset", seed=1)["chunk"]
        assert again == last + 1 and page.chunk(again)[0]["seed"] == 1 and page.chunks[again][0]["fps"] == 50


def test_what_a_prompt_cannot_say_is_told_and_the_stream_goes_on(client, capsys):
    with client.websocket_connect("/stream") as socket:
        page = Page(socket)
        assert page.ask("prompt", text="nonsense") == {
            "kind": "error",
            "id": 2,
            "message": "prompt must be two numbers, got 'nonsense'",
        }
        page.ask("prompt", text="broken")
        assert "the stream broke" in page.until("error")["message"]
        first = page.ask("reset", seed=3)["chunk"]
        assert np.array_equal(page.chunk(first)[1][0], dot_frame(3, 0, 1, 0, 16))
        assert page.ask("reset", seed=3, picture="aGVsbG8=")["message"].startswith("picture must be left out")
    assert "RuntimeError: a broken stream" in capsys.readouterr().err


# Hostile messages

HOSTILE = [
    "",
    "{",
    "null",
    "[]",
    "\x00\xff",
    "[" * 100_000,
    '{"kind": "direction", "id": 1, "x": 1}',
    '{"kind": "direction", "id": 1, "x": 2, "y": 0}',
    '{"kind": "direction", "id": 1, "x": 0, "y": 0}',
    '{"kind": "direction", "id": 1, "x": 1, "y": 0, "also": "this"}',
    '{"kind": "direction", "id": -1, "x": 1, "y": 0}',
    '{"kind": "direction", "id": true, "x": 1, "y": 0}',
    '{"kind": "run", "id": 1}',
    '{"kind": "join", "id": 1}',
    '{"kind": "pace", "id": 1, "fps": 1e999}',
    '{"kind": "pace", "id": 1, "fps": NaN}',
    '{"kind": "pace", "id": 1, "fps": 0}',
    '{"kind": "reset", "id": 1, "seed": 1e30}',
    '{"kind": "reset", "id": 1, "seed": -1}',
    '{"kind": "reset", "id": 1, "seed": 1, "picture": "not base64!"}',
    '{"kind": "reset", "id": 1, "seed": 1, "picture": "/etc/passwd"}',
    json.dumps({"kind": "prompt", "id": 1, "text": "a" * 2001}),
]


@pytest.mark.parametrize("text", HOSTILE, ids=lambda text: text[:40])
def test_a_hostile_message_is_refused_in_a_line(text):
    if '"join"' in text:  # refused by when it comes
        return
    with pytest.raises(BadMessage) as refused:
        read_message(text)
    assert "\n" not in str(refused.value) and len(str(refused.value)) <= 300


def test_after_hostile_messages_the_connection_goes_on(client):
    with client.websocket_connect("/stream") as socket:
        page = Page(socket)
        page.until("seat")
        for text in HOSTILE:
            socket.send_text(text)
            assert page.until("error")["message"]
        socket.send_bytes(bytes(range(256)))
        assert page.until("error")["message"] == "message must be JSON, got bytes"
        assert page.ask("direction", x=-1, y=1)["kind"] == "ack"


def test_commands_before_joining_are_refused(client):
    with client.websocket_connect("/stream") as socket:
        page = Page(socket, join=False)
        assert page.ask("direction", x=1, y=0)["message"] == "join must come first, and once"


def test_a_flood_ends_its_own_connection_alone():
    with client_of(dot_server(sessions=2)) as client, client.websocket_connect("/stream") as other:
        calm = Page(other)
        with client.websocket_connect("/stream") as socket:
            page = Page(socket)
            for _ in range(400):
                page.send("direction", x=1, y=0)
            told = {"kind": ""}
            while told["kind"] != "closed":
                told = page.receive()
            assert told["code"] == 1008
        assert calm.ask("direction", x=0, y=1)["kind"] == "ack"


def test_a_huge_message_is_refused():
    with pytest.raises(BadMessage, match="message must have at most"):
        read_message(" " * (LONGEST_COMMAND + 1))


# Who may call


@pytest.mark.parametrize(
    "headers",
    [
        {"origin": "http://evil.example"},
        {"origin": "null"},
        {"origin": "http://127.0.0.1:1"},
        {"origin": "http://evil.example", "host": "evil.example"},  # a name that an attacker points here
        {"host": "evil.example"},
        {"host": "127.0.0.1.evil.example"},
        {"host": ""},
    ],
    ids=str,
)
def test_a_foreign_page_cannot_connect(client, headers):
    with pytest.raises(WebSocketDisconnect), client.websocket_connect("/stream", headers=headers) as socket:
        Page(socket).receive()
    if "host" in headers:
        assert client.get("/", headers=headers).status_code == 400


@pytest.mark.parametrize("host", [None, "127.0.0.1", "localhost:8765", "[::1]:8765"])
def test_the_own_page_can(client, host):
    headers = {} if host is None else {"origin": f"http://{host}", "host": host}
    with client.websocket_connect("/stream", headers=headers) as socket:
        assert Page(socket).receive()["kind"] == "hello"


def test_the_page_is_all_that_can_be_read(client):
    for path, kind in {"/": "text/html", "/page.js": "text/javascript", "/page.css": "text/css"}.items():
        answer = client.get(path)
        assert answer.status_code == 200 and answer.headers["content-type"].startswith(kind)
        assert "frame-ancestors 'none'" in answer.headers["content-security-policy"]
    for path in ("/app.py", "/../app.py", "/page/../app.py", "/%2e%2e/app.py", "/..%2fapp.py", "//etc/passwd", "/index.html"):
        assert client.get(path).status_code == 404, path
    assert client.post("/", content=b"a" * 100).status_code == 405


# Several people


def test_further_people_watch_until_a_seat_is_free(monkeypatch):
    monkeypatch.setattr(people, "GRACE", 0.0)
    with (
        client_of(dot_server()) as client,
        client.websocket_connect("/stream") as one,
        client.websocket_connect("/stream") as two,
    ):
        first, second = Page(one), Page(two)
        first.until("seat")
        second.until("watch")
        assert second.until("people")["before"] == 0
        first.ask("direction", x=0, y=1)
        at = max(first.chunk(3)[0]["chunk"], second.chunk(3)[0]["chunk"])
        for number in {*first.chunks} & {*second.chunks}:
            assert np.array_equal(first.chunks[number][1], second.chunks[number][1])
        assert second.ask("reset", seed=3)["message"].startswith("command must come from who has a seat")
        one.close()
        assert second.until("seat")["token"]
        second.chunks.clear()
        answer = second.ask("reset", seed=3)
        assert answer["kind"] == "ack" and second.chunk(answer["chunk"])[0]["seed"] == 3 and answer["chunk"] > at


def test_reconnecting_goes_on_where_it_was():
    with client_of(dot_server()) as client:
        with client.websocket_connect("/stream") as socket:
            page = Page(socket)
            token = page.until("seat")["token"]
            page.ask("direction", x=0, y=1)
            page.chunk(4)
        left = max(page.chunks)
        with client.websocket_connect("/stream") as socket:
            Page(socket, "another toke\u00f1").until("watch")
        with client.websocket_connect("/stream") as socket:
            back = Page(socket, token)
            assert back.until("seat")["token"] == token
            head, _frames = back.chunk(left + 2)
            assert head["prompt"] == "0 1", "the stream goes on, and as it was told"
            again = client.websocket_connect("/stream")
            with again as second:
                assert Page(second, token).until("seat")["token"] == token
                while (told := back.receive())["kind"] != "closed":
                    pass
                assert told["code"] == 4001


def test_nobody_looks_and_nothing_is_made():
    server = dot_server()
    player = server.sessions[0].player
    with client_of(server) as client:
        time.sleep(0.3)
        assert player.made == []
        with client.websocket_connect("/stream") as socket:
            Page(socket).chunk(2)
        made, deadline = -1, time.monotonic() + 60
        while made != len(player.made):  # until it rests
            assert time.monotonic() < deadline
            made = len(player.made)
            time.sleep(0.5)  # 7 chunks' time


# Bounded queues


def test_a_slow_client_gets_the_newest_chunks_and_never_more():
    import asyncio

    async def slow():
        outbox = Outbox()
        for i in range(100):
            outbox.show(b"%d" % i)
        outbox.say(kind="ack")
        got = [await outbox.next() for _ in range(1 + WAITING_CHUNKS)]
        assert got == ['{"kind": "ack"}', b"98", b"99"] and outbox.skipped == 98
        for _ in range(WAITING_WORDS + 1):
            outbox.say(kind="ack")
        assert outbox.closed == (1008, "answers are not read") and await outbox.next() is None

    asyncio.run(slow())


def test_a_client_that_never_reads_delays_nobody():
    server = dot_server(side=128)
    with running(server) as address:
        host, port = address.split(":")
        dumb = socket.create_connection((host, int(port)))
        key = "GET /stream HTTP/1.1\r\nHost: {}\r\nUpgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Version: 13\r\n"
        dumb.sendall((key + "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n").format(address).encode())
        while dumb.recv(1) != b"\n":
            pass
        body = b'{"kind": "join", "id": 1}'
        dumb.sendall(bytes([0x81, 0x80 | len(body), 0, 0, 0, 0]) + body)
        deadline = time.monotonic() + 120
        outboxes = []
        while not (outboxes := [person.outbox for person in server.people.there]) or outboxes[0].skipped < 5:
            assert time.monotonic() < deadline, [outbox.skipped for outbox in outboxes]
            time.sleep(0.05)
        made = len(server.sessions[0].player.made)
        assert len(outboxes[0]._chunks) <= WAITING_CHUNKS
        while len(server.sessions[0].player.made) < made + 5:  # the model goes on
            assert time.monotonic() < deadline
            time.sleep(0.05)
        dumb.close()


# Turns


def turns_of(*players, fail=lambda *_: None):
    made = []
    sessions = [Session(i, player, Start(0), 60.0) for i, player in enumerate(players)]
    turns = Turns(sessions, DotModel().toward, lambda session, _: made.append(session.name), fail)
    for session in sessions:
        session.wanted = True
    return turns, sessions, made


def test_turns_are_fair_where_the_model_is_too_slow():
    slow = DotModel(seconds=0.03)  # two sessions of 15 chunks a second want 30
    turns, _, made = turns_of(slow.player(), slow.player(), slow.player())
    with turns:
        while len(made) < 30:
            time.sleep(0.01)
    for i in range(len(made) - 2):
        assert sorted(made[i : i + 3]) == [0, 1, 2], made


def test_a_broken_stream_does_not_stop_the_others(capsys):
    failed = []
    turns, (broken, _sound), made = turns_of(
        DotModel().player(), DotModel().player(), fail=lambda session, number, words: failed.append((session.name, words))
    )
    with turns:
        turns.command(broken, 1, Prompt(kind="prompt", id=1, text="broken"))
        before = len(made)
        while len(made) < before + 10:
            time.sleep(0.01)
    assert failed == [(0, "the stream broke and rests; reset begins another")] and set(made[-5:]) == {1}
    assert "RuntimeError" in capsys.readouterr().err


def test_of_waiting_commands_the_newest_counts():
    session = Session(0, DotModel().player(), Start(0), 10.0)
    left, up = (Direction(kind="direction", id=1, x=x, y=y) for x, y in ((-1, 0), (0, -1)))
    word = Prompt(kind="prompt", id=1, text="1 1")
    assert session.note(1, left) == 1 and session.note(2, word) == 1 and session.note(3, left) == 1 and session.note(4, up) == 1
    assert [command for _, command in session.pending] == [Start(0), word, up]
    session.note(5, Pause(kind="pause", id=5, paused=True))
    session.note(6, Start(9))
    assert session.pending == [(6, Start(9))] and not session.paused


# Starting


@pytest.mark.parametrize(
    "given, says",
    [
        ({"port": 70000}, "port must be in"),
        ({"port": -1}, "port must be in"),
        ({"sessions": 0}, "sessions must be in"),
        ({"sessions": 1000}, "sessions must be in"),
        ({"seed": -1}, "seed must be in"),
        ({"fps": 0.0}, "fps must lie in"),
        ({"fps": float("nan")}, "fps must lie in"),
        ({"host": " "}, "host must be an address"),
        ({"prompt": "a" * 2001}, "prompt must have at most"),
    ],
    ids=str,
)
def test_a_setting_that_does_not_fit_is_named(given, says):
    with pytest.raises(ValueError, match=says):
        ServeSettings(**given)


def test_a_taken_port_and_a_foreign_address_are_told():
    with listen(ServeSettings(port=0)) as first:
        port = first.getsockname()[1]
        with pytest.raises(ValueError, match=f"port must be free, {port} on 127.0.0.1 is not: .*; --port names another"):
            listen(ServeSettings(port=port))
    with pytest.raises(ValueError, match="host must be an address of this machine"):
        listen(ServeSettings(host="no.such.host.invalid", port=0))


def test_what_is_no_checkpoint_is_told(tmp_path, capsys):
    assert main(["serve", "--checkpoint", str(tmp_path / "none")]) == 2
    assert "found nothing at" in capsys.readouterr().err
    assert main(["serve", "--checkpoint", str(tmp_path), "--steps", "4"]) == 2
    assert "checkpoint must be" in capsys.readouterr().err


def test_no_other_command_needs_the_servers_libraries():
    code = """
import sys
sys.modules.update(dict.fromkeys(["starlette", "uvicorn", "websockets"]))
import aadkern
from aadkern_train.cli import main
assert main(["info"]) == 0
sys.exit(main(["serve", "--checkpoint", "/nowhere"]))
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 2 and "pip install 'aadkern[serve]'" in run.stderr, run.stderr
