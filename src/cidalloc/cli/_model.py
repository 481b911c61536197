"""The command ``model``: write the manager into a model repository."""

from __future__ import annotations

from pathlib import Path

import click

from ..errors import InvalidArgument
from ..settings import Settings
from ..triton_model import default_state_folder, export

__all__ = ["model"]


@click.command()
@click.argument("repository", metavar="DIR", type=click.Path(path_type=Path, file_okay=False))
@click.option("-o", "--overwrite", is_flag=True, help="Replace an earlier export.")
@click.option("-n", "--name", default="cidmgr", show_default=True, help="The model's name.")
@click.option("-m", "--modver", default=1, show_default=True, help="The model's version.")
@click.option(
    "--state",
    type=click.Path(path_type=Path, file_okay=False),
    help=f"The folder for the file in which the manager remembers what is held."
    f" [default: {default_state_folder()}]",
)
@click.option("--no-state", is_flag=True, help="Remember nothing across a restart.")
def model(
    repository: Path,
    overwrite: bool,
    name: str,
    modver: int,
    state: Path | None,
    no_state: bool,
) -> None:
    """Write the manager model into the Triton model repository DIR."""
    if state and no_state:
        raise InvalidArgument("--state and --no-state exclude each other")
    if state is None and not no_state:
        state = default_state_folder()
        state.mkdir(parents=True, exist_ok=True)
    if state and repository.resolve() in (state.resolve(), *state.resolve().parents):
        raise InvalidArgument(
            f"--state {state} is within the model repository: there, a file that changes makes"
            " Triton load the model anew"
        )
    settings = Settings(state=str(state.absolute()) if state else "")
    folder = export(repository, settings, name=name, version=modver, overwrite=overwrite)
    click.echo(f"Wrote {folder / 'config.pbtxt'} and {folder / str(modver) / 'model.py'}.")
    if state:
        click.echo(f"It will remember what is held in {state.absolute() / name}.cidalloc.")
        if not state.is_dir():
            click.echo(f"Make the folder {state} first, where the server runs.")
    click.echo("Next: install cidalloc where Triton's Python finds it, then load the model.")
