"""Models on disk: an ordinary Hugging Face folder with a model card."""

import shutil
import tempfile
from pathlib import Path

import yaml
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from kdlib.errors import KdlibError


def save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: str | Path, card: dict) -> None:
    """Write model (safetensors), tokenizer and model card as any transformers model, whole or not at all.

    Args:
        folder: must not exist; its parent is made.
        card: content of README.md in plain Python values: each dict (data, settings, metrics, versions, …) becomes a
            section, all else (license, base_model, …) its YAML front matter. How to load the model is added.

    Raises:
        KdlibError: the folder exists.
    """
    folder = Path(folder)
    if folder.exists():
        raise KdlibError(f"`folder` must be new, got {folder}, which exists already. Delete it or choose another name.")
    readme = _readme(folder.name, type(model), card)
    folder.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        model.save_pretrained(work)
        tokenizer.save_pretrained(work)
        (work / "README.md").write_text(readme, encoding="utf-8")
        work.chmod(0o755)  # mkdtemp's folders are private
        work.rename(folder)
    except BaseException:
        shutil.rmtree(work)
        raise


USE = """{register}from transformers import AutoModelForCausalLM, AutoTokenizer

folder = "."  # this one
tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
prompt = tokenizer("It was", return_tensors="pt", return_token_type_ids=False)
print(tokenizer.decode(model.generate(**prompt, max_new_tokens=20)[0]))
"""


def _readme(title: str, kind: type[PreTrainedModel], card: dict) -> str:
    def listing(values: dict) -> str:
        return yaml.safe_dump(values, sort_keys=False, allow_unicode=True)

    front = {"library_name": "transformers", "pipeline_tag": "text-generation"}
    front |= {name: value for name, value in card.items() if not isinstance(value, dict)}
    sections = (
        f"\n## {name.capitalize()}\n\n```yaml\n{listing(value)}```\n"
        for name, value in card.items()
        if isinstance(value, dict)
    )
    # A type that is not transformers' own is known to it once its module is imported.
    own = kind.__module__.startswith("transformers.")
    use = USE.format(register="" if own else f"import {kind.__module__}  # so that transformers knows this type of model\n")
    return f"---\n{listing(front)}---\n\n# {title}\n\n## Use\n\n```python\n{use}```\n{''.join(sections)}"
