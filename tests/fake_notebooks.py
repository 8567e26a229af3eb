"""Notebook files made on the spot."""

import json
from pathlib import Path


def write(path: Path, *sources: str, **metadata) -> Path:
    """A notebook of code cells, the first tagged ``parameters``."""
    cells = [
        {
            "cell_type": "code",
            "id": f"cell-{i}",
            "metadata": {"tags": ["parameters"]} if i == 0 else {},
            "execution_count": None,
            "outputs": [],
            "source": source.splitlines(keepends=True),
        }
        for i, source in enumerate(sources)
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"cells": cells, "metadata": metadata, "nbformat": 4, "nbformat_minor": 5}))
    return path


def save_as_jupyter_does(path: Path) -> None:
    """What opening, running and saving a notebook leaves: outputs, counts, metadata, other line breaks in the JSON."""
    notebook = json.loads(path.read_text())
    notebook["metadata"] = {"kernelspec": {"name": "another", "display_name": "Another", "language": "python"}}
    for number, cell in enumerate(notebook["cells"]):
        cell["metadata"] = {**cell["metadata"], "collapsed": True}
        cell["source"] = "".join(cell["source"])
        if cell["cell_type"] == "code":
            cell["execution_count"] = number
            cell["outputs"] = [{"output_type": "stream", "name": "stdout", "text": "seen"}]
    path.write_text(json.dumps(notebook, indent=4))
