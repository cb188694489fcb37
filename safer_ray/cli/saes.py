"""Commands on autoencoders from elsewhere: import-sae."""

from typing import Annotated

import typer

from safer_ray.cli.options import count_option, text_option
from safer_ray.cli.shared import ExistingPath, Out, check_out, console
from safer_ray.errors import UserError

app = typer.Typer()


@app.command("import-sae")
def import_sae_command(
    checkpoint: ExistingPath,
    out: Out,
    layer: Annotated[int, count_option(help="The block whose output it reads, 1-based; 12 as published.")],
    k: Annotated[int, count_option(help="Active latents a vector; 64 as published.")],
    model: Annotated[str, text_option(help="What its model is called, for the card.")] = "unknown",
) -> None:
    """Turn a stage1.pt or stage2.pt of the published SAFER code into an SAE that every command reads.

    Only tensors are read of it. It keeps negative activations and standardises with its own epsilon, as it was trained.
    """
    from safer_ray.sae.formats import read_published, save_sae

    out = check_out(out)
    if out.exists() and any(out.iterdir()):
        raise UserError(f"{out} is not empty; choose another --out")
    sae = read_published(checkpoint, k)
    save_sae(sae, out, model=model, layer=layer)
    console.print(f"{out}: {sae.latents:,} latents of {sae.d} dimensions, k {sae.k}, layer {layer}")
