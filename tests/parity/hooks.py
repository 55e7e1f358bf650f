"""Activations as hooks on the modules of transformers see them, by our names."""

import pytest

torch = pytest.importorskip("torch")

MODULES = {
    "attn.norm": "input_layernorm",
    "attn.out": "self_attn",
    "mlp.out": "mlp",
    "resid": "",
}
"""Activations to the modules of a layer whose outputs they are."""


def hooked(model, tokens):
    """Outputs of each layer's modules and its attention weights, by our names."""
    seen, handles = {}, []
    layers = model.base_model.layers
    for i, layer in enumerate(layers):
        for name, path in MODULES.items():
            if path == "self_attn" and not hasattr(layer, path):
                path = "attention"
            module = layer.get_submodule(path)

            def keep(_module, _args, output, name=f"layers.{i}.{name}"):
                first = output[0] if isinstance(output, tuple) else output
                seen[name] = first.reshape(-1, first.shape[-1]).numpy()

            handles.append(module.register_forward_hook(keep))
    with torch.no_grad():
        out = model(
            torch.tensor([tokens]), output_attentions=True, output_hidden_states=True
        )
    for handle in handles:
        handle.remove()
    for i, weights in enumerate(out.attentions):
        seen[f"layers.{i}.attn.probs"] = weights[0].transpose(0, 1).numpy()
        seen[f"layers.{i}.resid_in"] = out.hidden_states[i][0].numpy()
    seen["final"] = out.hidden_states[-1][0].numpy()
    return seen
