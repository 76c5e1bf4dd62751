"""For tests: `aad generate` as torchrun runs it in each process, the frames that it hands to the file kept beside that, in .npy."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

from aadkern_train.cli import main
from aadkern_train.engine.video import GrowingVideo

frames: list[np.ndarray] = []
write = GrowingVideo.write


def kept(self: GrowingVideo, new: np.ndarray) -> None:
    frames.append(np.asarray(new))
    write(self, new)


if __name__ == "__main__":
    GrowingVideo.write = kept  # type: ignore[assignment]
    status = main(["generate", *sys.argv[1:]])
    if frames:
        np.save(Path(sys.argv[sys.argv.index("--out") + 1]).with_suffix(".npy"), np.concatenate(frames))
    sys.exit(status)
