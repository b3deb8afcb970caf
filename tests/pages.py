"""The pages of the documentation, cut into blocks of code, which this file also runs.

    python tests/pages.py README.md      (in a folder that has what the page names)
    python tests/pages.py README.md PROGRAMS      (whose `convit` is the one of the folder PROGRAMS)

A page follows four rules:

- Blocks of ```python and ```bash are run in order, in one folder. The Python blocks of a page share
  one interpreter.
- A line `<!-- not run: REASON -->` just above a block leaves the block out.
- A ```text block just below a ```python block is what that block prints.
- A ```text block just below a ```bash block has lines of that command's output, in their order.
  Numbers and absolute paths in them may differ. The command fails if one of the lines begins with
  "error:".
"""

import contextlib
import dataclasses
import io
import os
import pathlib
import re
import subprocess
import sys
import warnings

ROOT = pathlib.Path(__file__).parent.parent
PAGES = (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md")))
RUN = ("python", "bash")

# Flags that make training quick, by what a command line contains; the first that fits.
_QUICK = {
    "finetune": "train.batch_size=8 train.epochs=1 data.workers=1 model.image_size=64 "
    "train.probe_images=0",
    "coordinator": "train.epochs=0.5 train.batch_size=32 train.probe_images=0",
    "digits": "train.epochs=0.5 train.eval_every=0.5 train.batch_size=32",
    "--config=": "train.batch_size=8 train.epochs=1 data.workers=1 model.embed_dim=36 "
    "model.depth=3 model.local_up_to_layer=2 model.image_size=64 train.probe_images=0",
}


@dataclasses.dataclass(frozen=True)
class Block:
    """A fenced block of a page.

    Attributes:
      page: the file.
      line: number of its first line of code, from 1.
      language: the word after the fence.
      text: its lines.
      reason: why it is not run; None: it is run if its language is.
      shown: the ```text block just below it, if there is one.
    """

    page: pathlib.Path
    line: int
    language: str
    text: str
    reason: str | None
    shown: str | None = None

    @property
    def where(self) -> str:
        return f"{self.page.name}:{self.line}"

    @property
    def is_run(self) -> bool:
        return self.language in RUN and self.reason is None


def blocks(page: pathlib.Path) -> list[Block]:
    """Returns the fenced blocks of a page in order.

    Raises:
      ValueError: if a block has no end.
    """
    lines = page.read_text().splitlines()
    found: list[Block] = []
    number, free = 0, True  # free: nothing but blank lines since the last block
    while number < len(lines):
        fence = re.fullmatch(r"```(\w*)", lines[number])
        if not fence:
            free &= not lines[number].strip()
            number += 1
            continue
        start = number + 1
        if "```" not in lines[start:]:
            raise ValueError(f"{page.name}:{start}: a block without an end")
        number = lines.index("```", start)
        text = "".join(f"{line}\n" for line in lines[start:number])
        above = re.fullmatch(r"<!-- not run: (.+) -->", lines[start - 2] if start > 1 else "")
        if fence[1] == "text" and free and found and found[-1].shown is None:
            found[-1] = dataclasses.replace(found[-1], shown=text)
        reason = above[1] if above else None
        found.append(Block(page, start + 1, fence[1], text, reason))
        number, free = number + 1, True
    return found


def check_output(block: Block, output: str) -> None:
    """Raises ValueError unless a block printed what its page shows."""
    if block.shown is None:
        return
    if block.language == "python":
        if output != block.shown:
            raise ValueError(f"{block.where} prints\n{output}instead of\n{block.shown}")
        return
    rest = [_pattern(line) for line in output.splitlines()]
    for line in block.shown.splitlines():
        wanted = _pattern(line)
        if wanted not in rest:
            raise ValueError(f"{block.where} prints\n{output}without, at its place,\n{line}")
        rest = rest[rest.index(wanted) + 1 :]


def _pattern(line: str) -> str:
    """Returns a line with its numbers, its absolute paths and its runs of spaces made equal."""
    line = re.sub(r"(?<=\s)/[^\s,:;]+", "/", line)
    line = re.sub(r"(?<!\w)(?<![a-z]-)\d+(?:[.,:]\d+)*", "0", line)  # but in names, as top-1
    return re.sub(r"\s+", " ", line).strip()


def _quick() -> str:
    """Shell functions that add the flags of `_QUICK` to the training commands."""
    cases = "".join(
        f"  *{part}*) echo {' '.join(f'--config.{flag}' for flag in flags.split())};;\n"
        for part, flags in _QUICK.items()
    )
    return f"""
quick() {{ case "$*" in *--mode=eval*|*" --help"*) ;;
{cases}  esac; }}
convit() {{
  if [ "$1" = train ]; then command convit "$@" $(quick "$@"); else command convit "$@"; fi
}}
python() {{
  if [ "$1" = main.py ]; then command python "$@" $(quick "$@"); else command python "$@"; fi
}}
"""


def _run_bash(block: Block, programs: list[str]) -> str:
    path = os.pathsep.join([*programs, os.path.dirname(sys.executable), os.environ["PATH"]])
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", _quick() + block.text],
        env=os.environ | {"PATH": path},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    fails = re.search(r"^error: ", block.shown or "", re.MULTILINE) is not None
    if (done.returncode != 0) != fails:
        raise ValueError(f"{block.where}: exit status {done.returncode}\n{done.stdout}")
    return done.stdout


def _run_python(block: Block, names: dict[str, object]) -> str:
    # Tracebacks show the page and the line in it.
    code = compile("\n" * (block.line - 1) + block.text, str(block.page), "exec")
    with contextlib.redirect_stdout(io.StringIO()) as output:
        exec(code, names)
    return output.getvalue()


def run(page: pathlib.Path, programs: list[str]) -> None:
    """Runs the blocks of a page in the current folder; raises if one fails or prints otherwise.

    Args:
      page: the file.
      programs: folders of programs, found before others.
    """
    names: dict[str, object] = {"__name__": "__main__"}
    for block in blocks(page):
        if not block.is_run:
            continue
        if block.language == "bash":
            output = _run_bash(block, programs)
        else:
            output = _run_python(block, names)
        check_output(block, output)


if __name__ == "__main__":
    sys.path[0] = str(ROOT)
    page = ROOT / sys.argv[1]
    if "import timm" in page.read_text():
        from benchmarks import peer

        peer.import_timm()  # works around a torchvision that does not fit torch's CPU build
    warnings.simplefilter("error")
    run(page, sys.argv[2:])
