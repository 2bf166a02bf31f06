"""Renames the tensors of published LLaVAs and drops the unused ones.

`open_tensors` is the main function. The result has the names of
`checkpoint_layouts.make_llava_table`.
"""

import collections
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from vlmrlaif_jax.huggingface import tensor_files
from vlmrlaif_jax.huggingface.tensor_files import Tensor

# Unused tensors of any folder; see drop_unused.
_UNUSED = {
  # Older versions of transformers saved these buffers with the parameters.
  "buffers": r"(position_ids|rotary_emb\.inv_freq)$",
  # SigLIP has this head; LLaVA reads the tokens of a layer instead.
  "image pooling head": r"^(?:vision_tower\.)?((?:vision_model\.)?head)\.",
}
# Unused tensors of a CLIP or SigLIP folder.
NOT_TOWER = {
  "not part of the tower": (
    r"^(text_model|(?:visual|text)_projection|logit_(?:scale|bias))(?:\.|$)"
  ),
}
# Patterns of published names -> replacements that lead to make_llava_table's names.
# All that match are applied, in order.
_RENAMES = (
  (r"^base_model\.model\.", ""),  # PEFT.
  # The original LLaVA.
  (r"^model\.vision_tower\.(?=vision_tower\.)", ""),
  (r"^model\.mm_projector\.(?=weight|bias)", "multi_modal_projector.linear_1."),
  (r"^model\.mm_projector\.0\.", "multi_modal_projector.linear_1."),
  (r"^model\.mm_projector\.2\.", "multi_modal_projector.linear_2."),
  (r"^model\.(?=layers\.|embed_tokens\.|norm\.)", "language_model.model."),
  (r"^lm_head\.", "language_model.lm_head."),
  # transformers: in memory from 4.52, on disk from 5.
  (r"^model\.(?=language_model|vision_tower|multi_modal|image_newline)", ""),
  (r"^language_model\.(?!model\.|lm_head\.)", "language_model.model."),
  (r"^vision_tower\.(?!vision_model\.)", "vision_tower.vision_model."),
)


def rename_published(name: str) -> str:
  """Maps a tensor name of a published LLaVA to its name in make_llava_table."""
  for pattern, replacement in _RENAMES:
    name = re.sub(pattern, replacement, name)
  return name


def open_tensors(
  folder: Path, rename: Callable[[str], str] = rename_published
) -> tuple[dict[str, Tensor], tuple[str, ...]]:
  """Opens the tensors of a folder and drops those that no model here uses.

  Returns:
    The tensors by their new names, and notes about the dropped ones.
  """
  tensors = {rename(name): x for name, x in tensor_files.open_folder(folder).items()}
  return drop_unused(_UNUSED, folder, tensors)


def drop_unused(
  unused: Mapping[str, str], folder: Path, tensors: dict[str, Tensor]
) -> tuple[dict[str, Tensor], tuple[str, ...]]:
  """Drops the unused tensors of a folder and returns notes about them.

  `unused` maps a description to a pattern of names. A note counts its first group.
  """
  notes = []
  for description, pattern in unused.items():
    dropped = {name: m[1] for name in tensors if (m := re.search(pattern, name))}
    tensors = {name: x for name, x in tensors.items() if name not in dropped}
    if dropped:
      counts = format_counts(dropped.values())
      notes.append(f"unused in {folder.name}: {description} ({counts})")
  return tensors, tuple(notes)


def format_counts(names: Iterable[str]) -> str:
  """Formats the number of occurrences of each name: "2 a, 1 b"."""
  counts = collections.Counter(names)
  return ", ".join(f"{count} {name}" for name, count in counts.items())
