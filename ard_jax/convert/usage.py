"""How a model card says that its folder is used."""

import ml_collections

from ard_jax.config import WORDLLAMA

CLASSES = "class_labels=[0, 1], num_images_per_label"
WORDS = '"a red apple", num_images_per_prompt'
EMBEDS = "prompt_embeds=tokens, prompt_attention_mask=mask"
STABLEHLO_OF_VECTORS = """It needs jax and numpy; ard_jax is not imported.

```python
import run

generate = run.load(".")  # this folder
images = generate(run.draw_noise(".", seed=0, count=len(tokens)), tokens, mask)  # float32 in [0, 1], channels last
```

`signature.json` says what goes in and comes out, and which platforms the modules run on."""
STABLEHLO_OF_CAPTIONS = """It needs jax and numpy, Pillow for pictures, and for prompts the library of its tokenizer
(tokenizers for a tokenizer.json, else sentencepiece); ard_jax is not imported.

```bash
python run.py --prompts "a red apple" "a green circle" --seed 0 --out images.png
```

```python
import run

generate = run.load(".")  # this folder
tokens, mask = run.encode(".", ["a red apple", "a green circle"])
images = generate(run.draw_noise(".", seed=0, count=2), tokens, mask)  # float32 in [0, 1], channels last
```

`signature.json` says what goes in and comes out, and which platforms the modules run on."""

STABLEHLO_USAGE = """It needs jax and numpy, and Pillow for pictures; ard_jax is not imported.

```bash
python run.py --labels 0 1 --seed 0 --out images.png
```

```python
import run

generate = run.load(".")  # this folder
images = generate(run.draw_noise(".", seed=0, count=2), [0, 1])  # float32 in [0, 1], channels last
```

`signature.json` says what goes in and comes out, and which platforms the modules run on."""


def usage(
    form: str,
    config: ml_collections.ConfigDict,
    is_student: bool,
    has_images: bool,
    *,
    text_encoder: str = "",
    repository: str = "",
) -> str:
    """Lines that work in the folder, or anywhere once it is on the hub; see `card.Facts`."""
    if form == "safetensors":
        return (
            "The names of the arrays are those of the published DiT and ARD repositories; what their shapes do not "
            "tell is in the file's metadata. ard_jax makes a model of it again:\n\n"
            "```bash\npython -m ard_jax convert --source . --workdir DIR\n```"
        )
    classes, diffusion = config.data.num_classes, config.diffusion
    # the names of a package's and of the hub's encoders mean nothing to diffusers
    is_named = text_encoder == WORDLLAMA or text_encoder.startswith("hf:")
    goes_along = bool(text_encoder) and not (form == "diffusers" and is_named)
    is_guided = not is_student and diffusion.guidance_scale != 1
    words = "" if classes or goes_along else f"\n\n{_vectors(form, is_guided)}"
    if form == "stablehlo":
        return (STABLEHLO_USAGE if classes else STABLEHLO_OF_CAPTIONS if goes_along else STABLEHLO_OF_VECTORS) + words
    place = f'"{repository}")' if repository else '".")  # this folder'
    if form == "diffusers":
        null = ", negative_prompt=None,\n    negative_prompt_embeds=empty, negative_prompt_attention_mask=empty_mask"
        prompts = '"a red apple"' if goes_along else f"\n    {EMBEDS}{null * is_guided}"
        told = "class_labels=[0, 1]" if classes else prompts
        kind = "DiTPipeline" if classes else "DiffusionPipeline"
        scale = 1.0 if classes not in (0, 1000) else diffusion.guidance_scale
        code = (
            f"from diffusers import {kind}\n\npipe = {kind}.from_pretrained({place}\n"
            f"images = pipe({told}, guidance_scale={float(scale)}, num_inference_steps={diffusion.steps}).images"
        )
    else:
        output = "" if has_images else ', output_type="latent"'
        prompts = f"{WORDS}=4" if goes_along else EMBEDS + ", negative_prompt_embeds=empty" * is_guided
        told = f"{CLASSES}=4" if classes else prompts
        code = (
            f"from ard_jax import ARDPipeline\n\npipe = ARDPipeline.from_pretrained({place}\n"
            f"images = pipe({told}, seed=0{output}).images"
        )
    return f"```python\n{code}\n```{words}"


def _vectors(form: str, is_guided: bool) -> str:
    """What a model of captions is told where no text encoder goes along."""
    padded = ", padded with zeros as `signature.json` says," if form == "stablehlo" else ""
    words = (
        f"No text encoder goes along: `tokens` (prompt, token, channel) and `mask` (prompt, token), which of them are "
        f"a prompt's own{padded} come from the one that the network was trained with"
    )
    if not is_guided or form == "stablehlo":
        return f"{words}."
    if form == "diffusers":
        return f"{words}, and `empty` and `empty_mask`, of the same shapes, are those of the empty prompt."
    return f"{words}, and `empty` (token, channel) are the empty prompt's own vectors."
