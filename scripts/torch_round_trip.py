#!/usr/bin/env python3
"""PyTorch's side of the round trip of checkpoints: tests/nn/torch.rs writes a folder and starts this script in it.

    python3 scripts/torch_round_trip.py DIR

Each case of DIR/cases.json names a checkpoint, the PyTorch module that must load it with strict=True, an input and what was computed from it.
The module's outputs must agree within 1e-5; then its parameters are changed and saved again, beside the outputs that they give.
Exit 0: all agree; 1: some do not; 77: PyTorch or safetensors is missing.
"""
import json
import pathlib
import sys

try:
    import torch
    from safetensors.torch import load_file, save_file
except ImportError as error:
    print(f"skipped: {error}")
    sys.exit(77)

folder = pathlib.Path(sys.argv[1])
torch.manual_seed(1)


def outputs(module, kind, x):
    module.eval()
    with torch.no_grad():
        if kind == "MultiheadAttention":
            return module(x, x, x)[0]
        return module(x) if kind == "TransformerEncoderLayer" else module(x)[0]


failed = 0
for case in json.loads((folder / "cases.json").read_text()):
    name, kind = case["name"], case["module"]
    module = getattr(torch.nn, kind)(**case["arguments"])
    module.load_state_dict(load_file(folder / f"{name}.safetensors"), strict=True)
    x = torch.tensor(case["x"]).reshape(case["shape"])
    wanted = torch.tensor(case["y"])
    error = (outputs(module, kind, x).flatten() - wanted).abs().max().item()
    print(f"{name}: torch {torch.__version__} differs by {error:.1e}")
    failed += not error < 1e-5
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    save_file(module.state_dict(), folder / f"{name}.torch.safetensors")
    (folder / f"{name}.torch.json").write_text(json.dumps(outputs(module, kind, x).flatten().tolist()))
sys.exit(1 if failed else 0)
