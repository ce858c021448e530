"""edgemoa: small boards on one network answer a prompt together."""

import os

__version__ = "0.1.0"

# The official builds of onnxruntime and onnxruntime-genai report usage to their maker's servers
# unless told not to before they are loaded. Nothing leaves a board that its owner did not send.
# (The second name is what some versions of onnxruntime look for.)
os.environ["ORT_DISABLE_TELEMETRY"] = "1"
os.environ["ORT_TELEMETRY_DISABLED"] = "1"
# huggingface_hub asks the hub, once a day, by which names to report the program that uses it.
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
