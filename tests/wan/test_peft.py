"""LoRA files beside peft itself, where it is installed: what it writes is read, and what training writes it reads."""

from __future__ import annotations

import pytest
import torch
from diffusers import WanTransformer3DModel
from safetensors.torch import save_file

from aadkern.wan import CausalWan, lora
from tests.networks.adapters import merged_by_hand, plain_base, write_base
from tests.wan.models import CONFIG

peft = pytest.importorskip("peft")
TARGETS = ["to_q", "to_v", "to_out.0", "ffn.net.0.proj"]


def network():
    torch.manual_seed(3)
    net = WanTransformer3DModel(**CONFIG)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.normal_(std=0.2)
    return net


def near(ours, theirs, base):
    """Weights are those, and other than the base's."""
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, theirs[name], rtol=1e-5, atol=1e-6)
    assert sum(not torch.equal(ours[name], base[name]) for name in ours) == 7 * CONFIG["num_layers"]


def randomised(module):
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.3)


@pytest.mark.parametrize("rooted", [False, True])
def test_pefts_own_folder(tmp_path, rooted):
    net, model = network(), CausalWan(**CONFIG)
    base = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    model.load_state_dict(base)
    settings = peft.LoraConfig(r=3, lora_alpha=7, use_rslora=rooted, target_modules=TARGETS)
    adapted = peft.get_peft_model(net, settings)
    randomised(adapted)
    adapted.save_pretrained(tmp_path)
    lora.load(model, tmp_path)
    near(model.state_dict(), adapted.merge_and_unload().state_dict(), base)


def test_diffusers_own_file(tmp_path):
    net, model = network(), CausalWan(**CONFIG)
    base = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    model.load_state_dict(base)
    net.add_adapter(peft.LoraConfig(r=3, lora_alpha=7, target_modules=TARGETS))
    randomised(net)
    net.save_lora_adapter(tmp_path)
    lora.load(model, tmp_path)
    net.fuse_lora()
    near(model.state_dict(), {n.replace(".base_layer", ""): t for n, t in net.state_dict().items() if "lora_" not in n}, base)


def test_what_training_writes_is_read_by_diffusers_and_by_us(tmp_path):
    folder = write_base(tmp_path)
    view = plain_base(folder).view("generator")
    file = tmp_path / "adapter.safetensors"
    save_file(view.tensors(), file)
    merged = merged_by_hand(folder, view, torch.float32).net.state_dict()
    ours = CausalWan.from_pretrained(folder)
    lora.load(ours, file)
    theirs = CausalWan.from_pretrained(folder)
    theirs.load_lora_adapter(tmp_path, weight_name=file.name, prefix="transformer")
    theirs.fuse_lora()
    fused = {n.replace(".base_layer", ""): t for n, t in theirs.state_dict().items() if "lora_" not in n}
    for name, tensor in merged.items():
        torch.testing.assert_close(ours.state_dict()[name], tensor, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(fused[name], tensor, rtol=1e-5, atol=1e-5)
