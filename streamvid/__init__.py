"""streamvid: causal video students, distilled from diffusion teachers, that stream.

Importing this package touches no device and no disk and loads neither diffusers nor transformers;
import the submodule that you need (``streamvid.rollout.loop``, ``streamvid.objectives.dmd``, ...).
"""

__version__ = "0.2.0"
