"""The packages of vlmrlaif_jax by tier: which may import which, and what each holds.

tests/test_imports.py checks the imports; tools/draw_packages.py draws the tiers.
"""

TIERS = (  # From the lowest. Packages of one tier do not import each other.
  ("core", "losses"),
  ("models", "data", "training"),
  ("sampling", "huggingface", "feedback"),
  ("methods", "evals", "runtime"),
  ("stages", "report"),
  ("planner", "serving"),
  ("recipes",),
)
TIER = {package: tier for tier, names in enumerate(TIERS) for package in names}
NEVER = {  # Package -> libraries that none of its modules imports.
  "losses": {"flax", "optax", "ml_collections"},
  "models": {"optax", "ml_collections"},
  "data": {"jax", "flax", "optax"},
  "report": {"jax", "flax"},
}
