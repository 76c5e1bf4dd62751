// The page's side of serve/protocol.py: plays chunks on a canvas at their pace, and sends commands.
"use strict";

const $ = (id) => document.getElementById(id);
const screen_ = $("screen");
const paint = screen_.getContext("2d", { willReadFrequently: true });
const TOKEN = "aadkern token";
const FINAL = new Set([4001, 1013]); // closings after which trying again is no use
const LARGEST_PICTURE = 8 << 20;

let socket = null;
let about = null; // what the server told of its model
let seated = false;
let number = 0; // of the newest command
let waits = 500; // ms until the next attempt to connect
const sent = new Map(); // commands on their way: id -> {at, chunk}

// Playing: frames wait here, those of two chunks at most.

let queue = [];
let decoding = Promise.resolve();
let undecoded = 0;
let nextAt = 0;
let skipped = 0;

function take(buffer) {
  const length = new DataView(buffer).getUint32(0, true);
  const head = JSON.parse(new TextDecoder().decode(new Uint8Array(buffer, 4, length)));
  if (undecoded >= 2) {
    skipped += head.frames;
    return;
  }
  undecoded += 1;
  decoding = decoding.then(() => images(head, buffer, 4 + length)).then((made) => {
    undecoded -= 1;
    const newest = queue.length ? queue[queue.length - 1].head.chunk : 0;
    if (queue.length && queue[0].head.chunk < newest) { // too slow: the newest chunk alone stays
      skipped += queue.filter((frame) => frame.head.chunk < newest).length;
      queue = queue.filter((frame) => frame.head.chunk === newest);
    }
    queue.push(...made.map((image, index) => ({ head, image, index })));
  }).catch((error) => { undecoded -= 1; complain(error); });
}

async function images(head, buffer, at) {
  const made = [];
  let start = at;
  if (head.format === "rgb") {
    const rgb = new Uint8Array(buffer, at), pixels = head.width * head.height;
    for (let frame = 0; frame < head.frames; frame++) {
      const image = new ImageData(head.width, head.height);
      for (let i = 0; i < pixels; i++) {
        for (let c = 0; c < 3; c++) image.data[4 * i + c] = rgb[3 * (frame * pixels + i) + c];
        image.data[4 * i + 3] = 255;
      }
      made.push(image);
    }
    return made;
  }
  for (const size of head.sizes) {
    made.push(await createImageBitmap(new Blob([new Uint8Array(buffer, start, size)], { type: "image/jpeg" })));
    start += size;
  }
  return made;
}

function play(now) {
  while (queue.length && now >= nextAt) {
    const { head, image, index } = queue.shift();
    const own = 1000 * head.seconds / head.frames * about.sessions;
    const apart = Math.max(1000 / head.fps, Math.min(1000 / head.rate, own));
    nextAt = Math.max(nextAt, now - apart) + apart;
    draw(head, image, index, now);
  }
  requestAnimationFrame(play);
}

function draw(head, image, index, now) {
  if (screen_.width !== head.width || screen_.height !== head.height) {
    screen_.width = head.width;
    screen_.height = head.height;
  }
  screen_.classList.toggle("small", head.width < 320);
  if (image instanceof ImageData) paint.putImageData(image, 0, 0);
  else { paint.drawImage(image, 0, 0); image.close(); }
  if (recording) recording.add();
  for (const [id, command] of sent) {
    if (command.chunk === undefined || head.chunk < command.chunk) continue;
    $("latency").textContent = `${Math.round(now - command.at)} ms`;
    sent.delete(id);
    if (command.direction) mark(command.direction);
  }
  if (index === 0) tell(head);
  screen_.dispatchEvent(new CustomEvent("drawn", { detail: { chunk: head.chunk, frame: index, seed: head.seed } }));
}

function tell(head) {
  const place = head.place;
  $("shown").textContent = head.prompt || "(none)";
  $("rate").textContent = `${head.rate.toFixed(1)} of ${head.fps.toFixed(0)}` + (skipped ? `, ${skipped} skipped here` : "");
  $("chunk").textContent = `${head.chunk}, made in ${(1000 * head.seconds).toFixed(0)} ms`;
  $("place").textContent = `frame ${place.frame} in slot ${place.slot} of ${place.slots}`;
  const ring = $("ring");
  while (ring.children.length > place.slots) ring.lastChild.remove();
  while (ring.children.length < place.slots) ring.append(document.createElement("i"));
  [...ring.children].forEach((slot, i) => {
    slot.className = (i < place.sink ? "sink " : "") + (i === place.slot ? "now" : "");
  });
}

// Commands

function send(kind, fields) {
  if (!socket || socket.readyState !== WebSocket.OPEN || !seated) return;
  number += 1;
  if (sent.size > 32) sent.delete(sent.keys().next().value);
  sent.set(number, { at: performance.now(), direction: kind === "direction" ? `${fields.x},${fields.y}` : null });
  $("trouble").textContent = "";
  socket.send(JSON.stringify({ kind, id: number, ...fields }));
}

function steer(x, y) {
  if (about && about.directions && (x || y)) send("direction", { x, y });
}

function mark(direction) {
  for (const button of $("pad").querySelectorAll("button")) {
    button.classList.toggle("on", `${button.dataset.x},${button.dataset.y}` === direction);
  }
}

const held = new Set();
const ARROWS = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };

addEventListener("keydown", (event) => {
  if (event.target instanceof HTMLInputElement || event.ctrlKey || event.metaKey || event.altKey) return;
  if (event.key === " " && !(event.target instanceof HTMLButtonElement)) {
    event.preventDefault();
    $("pause").click();
  }
  if (!(event.key in ARROWS)) return;
  event.preventDefault();
  if (event.repeat) return;
  held.add(event.key);
  let x = 0, y = 0;
  for (const key of held) { x += ARROWS[key][0]; y += ARROWS[key][1]; }
  steer(x, y);
});
addEventListener("keyup", (event) => held.delete(event.key));
addEventListener("blur", () => held.clear());

$("pad").addEventListener("click", (event) => {
  const { x, y } = event.target.dataset;
  if (x !== undefined) steer(Number(x), Number(y));
});

let touched = null;
screen_.addEventListener("pointerdown", (event) => { touched = event; });
addEventListener("pointerup", (event) => {
  if (!touched || touched.pointerId !== event.pointerId) return;
  const dx = event.clientX - touched.clientX, dy = event.clientY - touched.clientY;
  touched = null;
  if (Math.hypot(dx, dy) < 12) return;
  const eighth = Math.round(Math.atan2(dy, dx) / (Math.PI / 4));
  steer(Math.round(Math.cos(eighth * Math.PI / 4)), Math.round(Math.sin(eighth * Math.PI / 4)));
});

$("asking").addEventListener("submit", (event) => {
  event.preventDefault();
  send("prompt", { text: $("prompt").value });
});

$("pause").addEventListener("click", () => {
  const paused = $("pause").getAttribute("aria-pressed") !== "true";
  send("pause", { paused });
  pressed("pause", paused, "Go on", "Pause");
});

$("pace").addEventListener("change", () => send("pace", { fps: Number($("pace").value) }));

$("reset").addEventListener("click", async () => {
  if (!$("seed").reportValidity()) return;
  const file = $("picture").files[0];
  if (file && file.size > LARGEST_PICTURE) return complain("The picture's file must have at most 8 MiB.");
  const picture = file ? await base64(file) : null;
  pressed("pause", false, "Go on", "Pause");
  send("reset", { seed: Number($("seed").value), prompt: $("prompt").value || null, picture });
});

function base64(file) {
  return new Promise((done, failed) => {
    const reader = new FileReader();
    reader.onload = () => done(reader.result.slice(reader.result.indexOf(",") + 1));
    reader.onerror = () => failed(reader.error);
    reader.readAsDataURL(file);
  });
}

function pressed(id, on, yes, no) {
  $(id).setAttribute("aria-pressed", on);
  $(id).textContent = on ? yes : no;
}

// Recording, here and not on the server: what was seen, as an mp4 where the browser writes them, else a webm.

const FORMATS = ["video/mp4;codecs=avc1.42E01E", "video/mp4;codecs=vp09.00.10.08", "video/mp4", "video/webm"];
let recording = null;

$("record").addEventListener("click", () => {
  if (recording) return recording.stop();
  const type = window.MediaRecorder && FORMATS.find((format) => MediaRecorder.isTypeSupported(format));
  if (!type) return complain("This browser does not record.");
  const scale = Math.max(1, Math.floor(256 / screen_.width));
  const large = document.createElement("canvas");
  large.width = screen_.width * scale;
  large.height = screen_.height * scale;
  const on = large.getContext("2d");
  on.imageSmoothingEnabled = false;
  const add = () => on.drawImage(screen_, 0, 0, large.width, large.height);
  add();
  const recorder = new MediaRecorder(large.captureStream(), { mimeType: type, videoBitsPerSecond: 8e6 });
  const parts = [];
  recorder.ondataavailable = (event) => parts.push(event.data);
  recorder.onstop = () => {
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob(parts, { type }));
    link.download = `stream-${$("seed").value}.${type.startsWith("video/mp4") ? "mp4" : "webm"}`;
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 60000);
  };
  recorder.start(1000);
  recording = { add, stop: () => { recording = null; recorder.stop(); pressed("record", false, "", "Record"); } };
  pressed("record", true, "Stop and save", "");
});

// The connection

function connect() {
  socket = new WebSocket(`${location.protocol === "https:" ? "wss:" : "ws:"}//${location.host}/stream`);
  socket.binaryType = "arraybuffer";
  socket.onopen = () => {
    number += 1;
    socket.send(JSON.stringify({ kind: "join", id: number, token: sessionStorage.getItem(TOKEN) }));
  };
  socket.onmessage = ({ data }) => (typeof data === "string" ? hear(JSON.parse(data)) : take(data));
  socket.onclose = ({ code, reason }) => {
    seat(false);
    sent.clear();
    if (FINAL.has(code)) { $("status").textContent = reason; return; }
    $("status").textContent = `${reason || "the connection broke"}; trying again`;
    setTimeout(connect, waits);
    waits = Math.min(2 * waits, 5000);
  };
}

function hear(message) {
  if (message.kind === "hello") {
    waits = 500;
    about = message;
    $("model").textContent = message.name;
    $("backend").textContent = message.backend;
    $("pad").hidden = $("hint").hidden = !message.directions;
    $("asking").hidden = !message.prompts;
    $("pictures").hidden = !message.pictures;
    $("seed").value = message.seed;
    $("pace").value = message.fps;
  } else if (message.kind === "seat") {
    sessionStorage.setItem(TOKEN, message.token);
    seat(true);
    pressed("pause", message.paused, "Go on", "Pause");
    $("status").textContent = "yours to steer";
  } else if (message.kind === "watch") {
    seat(false);
  } else if (message.kind === "people") {
    $("people").textContent = message.there;
    if (message.before !== null) $("status").textContent = `watching; ${message.before} before you wait for a seat`;
  } else if (message.kind === "ack") {
    const command = sent.get(message.id);
    if (command) command.chunk = message.chunk;
    screen_.dispatchEvent(new CustomEvent("ack", { detail: message }));
  } else if (message.kind === "error") {
    sent.delete(message.id);
    complain(message.message);
  }
}

function seat(mine) {
  seated = mine;
  for (const control of document.querySelectorAll("section button, section input")) {
    if (control.id !== "record") control.disabled = !mine;
  }
}

function complain(what) {
  $("trouble").textContent = String(what.message || what);
}

seat(false);
connect();
requestAnimationFrame(play);
