"""Python commands in processes of their own, forked from one that has imported what all of them need.

Most of a short command's time goes into imports. Its arguments, environment, working folder and the path that modules
are found on are those that a new interpreter would have.
"""

import gc
import json
import os
import runpy
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path


class Server:
    """Runs commands, one at a time."""

    def __init__(self, process: subprocess.Popen):
        self._process = process

    def run(self, *arguments: str, cwd: Path, env: Mapping[str, str]) -> tuple[int, str]:
        """Exit status and output of ``python *arguments``, which begin with ``-m module`` or ``-c code``."""
        with tempfile.NamedTemporaryFile("r", encoding="utf-8", errors="replace") as output:
            task = {"arguments": arguments, "cwd": str(cwd), "env": dict(env), "output": output.name}
            self._process.stdin.write(json.dumps(task) + "\n")
            self._process.stdin.flush()
            return int(self._process.stdout.readline()), output.read()


@contextmanager
def server(prepared: str, env: Mapping[str, str] = os.environ) -> Iterator[Server]:
    """A process that has executed the code ``prepared``, such as imports."""
    command = [sys.executable, __file__, prepared]
    streams = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, env=dict(env), **streams) as process:
        yield Server(process)
        process.stdin.close()


def _next_task() -> dict:
    """The task of this process, which was forked for it."""
    for line in sys.stdin:
        if not (child := os.fork()):
            return json.loads(line)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
    sys.exit()


def _become(arguments: list[str], cwd: str, env: dict[str, str], output: str) -> None:
    """Run the command, as the interpreter would have from its start."""
    with open(os.devnull) as nothing, open(output, "w") as file:
        for stream, number in ((nothing, 0), (file, 1), (file, 2)):
            os.dup2(stream.fileno(), number)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    before = [path for path in env.get("PYTHONPATH", "").split(os.pathsep) if path]
    sys.path[:] = [cwd, *before, *_PATH]
    kind, what, *rest = arguments
    sys.argv = [kind, *rest]
    if kind == "-m":
        sys.argv[0] = what
        runpy.run_module(what, run_name="__main__", alter_sys=True)
    else:
        exec(compile(what, "<string>", "exec"), {"__name__": "__main__"})


if __name__ == "__main__":
    added = [os.path.dirname(os.path.abspath(__file__)), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    _PATH = [path for path in sys.path if path not in added]
    exec(sys.argv[1], {})
    gc.freeze()
    _become(**_next_task())
