"""Run the notebooks in this folder, each in a kernel of its own.

    python examples/run_notebooks.py            # run them; an error in a cell ends it
    python examples/run_notebooks.py --save     # and store what their cells print and draw

Warnings, times and the kernel's version are not stored, so that the files change only where a result does.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import nbformat
from nbclient import NotebookClient

FOLDER = Path(__file__).parent


def run_notebook(path: Path) -> nbformat.NotebookNode:
    """Return the notebook with the outputs of its cells, run in this folder."""
    notebook = nbformat.read(path, as_version=4)
    metadata = notebook.metadata.copy()
    place = {"metadata": {"path": str(FOLDER)}}
    NotebookClient(notebook, timeout=1200, resources=place, record_timing=False).execute()
    notebook.metadata = metadata
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
    return notebook


def main() -> None:
    """Run the notebooks that are named, or all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("notebooks", nargs="*", type=Path, help="which ones; none: all in this folder")
    parser.add_argument("--save", action="store_true", help="store the outputs in the notebooks")
    options = parser.parse_args()
    for path in options.notebooks or sorted(FOLDER.glob("*.ipynb")):
        notebook = run_notebook(path)
        if options.save:
            nbformat.write(notebook, path)
        print(f"{path.name}: {len(notebook.cells)} cells")


if __name__ == "__main__":
    main()
