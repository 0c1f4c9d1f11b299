"""What model cards are made of: names that may be published, front matter, how to use the model, whom to cite.

A card is there to be published. Of a path on this machine it shows the last part; names of the hub stay whole.
"""

import json
import os
import platform
import re
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCardData

from fastcorl import __version__
from fastcorl.places import QUICKSTART, hub_name

CARD = "README.md"
TAGS = ("fastcorl", "corl", "grpo", "janus")
PAPER = "[CoRL](https://arxiv.org/abs/2505.17534)"
PROSE = ("templates", "caption_instruction", "columns", "subset", "split", "revision", "project")  # may have slashes

_FRONT_MATTER = re.compile(r"---\n(.*?)\n---(?:\n|$)", re.DOTALL)

_USE = """\
## Use

With transformers:

```python
from PIL import Image
from transformers import AutoProcessor, JanusForConditionalGeneration

name = "owner/name"  # where this file is: a name of the hub, or a folder
model = JanusForConditionalGeneration.from_pretrained(name)
processor = AutoProcessor.from_pretrained(name)


def asked(*content):
    return processor.apply_chat_template([{{"role": "user", "content": list(content)}}], add_generation_prompt=True)


text = asked({{"type": "text", "text": "a caption"}})
inputs = processor(text=text, generation_mode="image", return_tensors="pt")
codes = model.generate(**inputs, generation_mode="image", do_sample=True, guidance_scale={scale})
pixels = model.decode_image_tokens(codes)[0].float() / 2 + 0.5
Image.fromarray((pixels.clamp(0, 1) * 255).round().byte().cpu().numpy()).save("drawing.png")

text = asked({{"type": "image"}}, {{"type": "text", "text": {question}}})
inputs = processor(text=text, images=[Image.open("drawing.png")], return_tensors="pt")
answer = model.generate(**inputs, generation_mode="text", do_sample=False, max_new_tokens={tokens})
print(processor.decode(answer[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
```

With fastcorl:

```
fastcorl generate --model owner/name --guidance {guidance} --num 4 --grid drawing.png --prompt "a caption"
fastcorl ask --model owner/name --image drawing.png --question "a question"
fastcorl evaluate --model owner/name --data ROWS
```"""

_ABOUT = """\
## Versions and licence

{versions}.

No licence is stated here: those of the model it was trained from and of the data hold.

## Citation

```bibtex
@article{{jiang2025corl,
  title   = {{Co-Reinforcement Learning for Unified Multimodal Understanding and Generation}},
  author  = {{Jingjing Jiang and Chongjie Si and Jun Luo and Hanwang Zhang and Chao Ma}},
  journal = {{arXiv preprint arXiv:2505.17534}},
  year    = {{2025}}
}}
```"""


@dataclass(frozen=True)
class Origin:
    """Names of the hub that a model comes from."""

    models: tuple[str, ...] = ()
    data_sets: tuple[str, ...] = ()


def is_hub_name(text: str) -> bool:
    """Whether `text` is `owner/name`, or `owner/name:split`, and no path here."""
    return hub_name(text) is not None and not os.path.exists(text.partition(":")[0])


def public_name(text: str) -> str:
    """`text` as a card shows it: of a path its last part, of a run's export those from the run's name on."""
    parts = [part for part in re.split(r"[/\\]+", text) if part]
    if len(parts) < 2 or is_hub_name(text):
        return parts[0] if text.startswith(("/", "\\")) and parts else text
    return "/".join(parts[-3:]) if parts[-2] == "export" and len(parts) > 2 else parts[-1]


def published(value: Any) -> Any:
    """Plain data with the names in it as `public_name` gives them."""
    if isinstance(value, dict):
        return {key: inner if key in PROSE else published(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [published(inner) for inner in value]
    return public_name(value) if isinstance(value, str) else value


def linked(source: str) -> str:
    """The model or data set `source` for a reader; a model of the hub is a link."""
    if source == QUICKSTART:
        return "the model shipped with fastcorl"
    return f"[{source}](https://huggingface.co/{source})" if is_hub_name(source) else f"`{public_name(source)}`"


def origin_of(source: str) -> Origin:
    """Where the model `source` comes from: the hub, or what its own card says, if fastcorl wrote that."""
    if is_hub_name(source):
        return Origin((source,))
    stated = read_front_matter(Path(source))
    return Origin(_names(stated.get("base_model")), _names(stated.get("datasets")))


def joined(origins: Iterable[Origin]) -> Origin:
    models, data_sets = {}, {}
    for origin in origins:
        models |= dict.fromkeys(origin.models)
        data_sets |= dict.fromkeys(origin.data_sets)
    return Origin(tuple(models), tuple(data_sets))


def read_front_matter(folder: Path) -> dict[str, Any]:
    """The front matter of the card in `folder`, if there is one that fastcorl wrote."""
    try:
        match = _FRONT_MATTER.match((folder / CARD).read_text(encoding="utf-8"))
        stated = yaml.safe_load(match[1]) if match else None
    except (OSError, ValueError, yaml.YAMLError):  # somebody's own file, of any kind
        return {}
    return stated if isinstance(stated, dict) and TAGS[0] in _names(stated.get("tags")) else {}


def card_text(origin: Origin, tags: Iterable[str], *parts: str) -> str:
    """A card of these parts."""
    models = list(origin.models)
    data = ModelCardData(
        base_model=models[0] if len(models) == 1 else models or None,
        datasets=list(origin.data_sets) or None,
        library_name="transformers",
        pipeline_tag="any-to-any",
        tags=list(tags),
    )
    return "\n\n".join([f"---\n{data.to_yaml()}\n---", *(part for part in parts if part)]) + "\n"


def use(*, guidance: float = 5.0, tokens: int = 512, question: str = "a question") -> str:
    """How to draw and ask with the model; `question` is one as it was put in training."""
    # transformers fails at guidance 1, which is the conditional branch alone.
    scale = guidance if guidance > 1 else 1.0001
    return _USE.format(
        guidance=f"{guidance:g}", scale=f"{scale:g}", tokens=tokens, question=json.dumps(question, ensure_ascii=False)
    )


def about() -> str:
    """Versions, licence, citation."""
    versions = {"Python": platform.python_version(), "fastcorl": __version__}
    versions |= {name: version(name) for name in ("torch", "transformers")}
    return _ABOUT.format(versions=", ".join(f"{name} {number}" for name, number in versions.items()))


def _names(stated: Any) -> tuple[str, ...]:
    """One name or several, as front matter gives them."""
    names = stated if isinstance(stated, list) else [stated]
    return tuple(name for name in names if isinstance(name, str))
