"""The quickstart's supervised start as a run of its own: imitation of sloppy worked solutions.

    python -m grpo_jax.sft --config configs/sft.py --workdir runs/sft

About two minutes on two CPU cores. The Hugging Face folder in runs/sft/export answers a tenth of
the held-out sums; `python -m grpo_jax.train --config configs/quickstart.py
--config.model.path=runs/sft/export` goes on from it.
"""

import importlib.util
from pathlib import Path


def get_config():
    path = Path(__file__).with_name("quickstart.py")
    spec = importlib.util.spec_from_file_location("quickstart", path)
    quickstart = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(quickstart)
    return quickstart.get_config()
