#!/usr/bin/env bash
# Versions: peft 0.21.2, transformers 5.23.0, accelerate 1.15.0, torch 2.13.0, numpy 2.4.6; Python 3.11. Seen since 2026-11-28.
#
# What happens: target_modules="all-linear" means other weights from one mixture of experts to the next. In transformers 5 the experts of
# all four architectures below are the same two parameters (gate_up_proj and down_proj, one slice per expert), which are no linear modules.
# With Mixtral and Qwen3-MoE peft adapts them and the router all the same, as target_parameters that nobody asked for: rank 2 then is
# 2 per expert on down_proj and 4 per expert on gate_up_proj, and a warning says that this larger rank was ignored, which it was not.
# With Qwen2-MoE and GraniteMoE peft adapts neither the router nor the experts, and says nothing.
#
# Seen (rank 2, one layer, four experts; the rank is that of lora_A over all experts):
#   mixtral     q_proj 2, k_proj 2, v_proj 2, o_proj 2, gate 2, experts.down_proj 8, experts.gate_up_proj 16; warned of: gate_up_proj
#   qwen3_moe   q_proj 2, k_proj 2, v_proj 2, o_proj 2, experts.down_proj 8, experts.gate_up_proj 16, gate 2; warned of: gate_up_proj
#   qwen2_moe   q_proj 2, k_proj 2, v_proj 2, o_proj 2, shared_expert.gate_proj 2, shared_expert.up_proj 2, shared_expert.down_proj 2,
#               shared_expert_gate 2
#   granitemoe  q_proj 2, k_proj 2, v_proj 2, o_proj 2
#
# Why it matters: two models that are trained with the same settings are not adapted in the same places, nor with adapters of comparable
# size; what is sent in federated training grows with the number of experts in one case and not in the other.
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3.11 -m venv "$work/venv"
"$work/venv/bin/pip" install -q peft==0.21.2 transformers==5.23.0 accelerate==1.15.0 torch==2.13.0 numpy==2.4.6

cd "$work"
export HF_HOME="$work/cache" HF_HUB_OFFLINE=1
venv/bin/python - <<'PYTHON'
import warnings

from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM

COMMON = {
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "num_experts_per_tok": 2,
}
QWEN = {"num_experts": 4, "moe_intermediate_size": 24, "decoder_sparse_step": 1}
KINDS = {
    "mixtral": {"num_local_experts": 4},
    "qwen3_moe": {**QWEN, "head_dim": 8},
    "qwen2_moe": {**QWEN, "shared_expert_intermediate_size": 24},
    "granitemoe": {"num_local_experts": 4},
}
ATTENTION = {"q_proj": 2, "k_proj": 2, "v_proj": 2, "o_proj": 2}
WITH_EXPERTS = {**ATTENTION, "gate": 2, "experts.gate_up_proj": 16, "experts.down_proj": 8}
SHARED = {f"shared_expert{name}": 2 for name in (".gate_proj", ".up_proj", ".down_proj", "_gate")}


def ranks(model):
    """The rank of each adapter by the name of what it adapts."""
    found = {}
    for name, module in model.named_modules():
        if not getattr(module, "lora_A", None):
            continue
        name = name.replace(".base_layer", "").split("layers.0.")[1].split(".", 1)[1]  # less the block's own name
        parameter = getattr(module, "parameter_name", "weight")
        label = name if parameter == "weight" else f"{name}.{parameter}"
        assert label not in found, label
        found[label] = module.lora_A["default"].weight.shape[0]
    return found


seen = {}
for kind, settings in KINDS.items():
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **COMMON, **settings))
    fused = [name for name, weight in model.named_parameters() if weight.dim() == 3]
    assert [name.rsplit(".", 2)[1:] for name in fused] == [["experts", "gate_up_proj"], ["experts", "down_proj"]], fused
    with warnings.catch_warnings(record=True) as raised:
        warnings.simplefilter("always")
        found = ranks(get_peft_model(model, LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM")))
    warned = any("rank_pattern" in str(warning.message) and "gate_up_proj" in str(warning.message) for warning in raised)
    seen[kind] = found, warned
    print(f"{kind:<10}  " + ", ".join(f"{name} {rank}" for name, rank in found.items()) + ("; warned of: gate_up_proj" if warned else ""))

expected = {
    "mixtral": (WITH_EXPERTS, True),
    "qwen3_moe": (WITH_EXPERTS, True),
    "qwen2_moe": ({**ATTENTION, **SHARED}, False),
    "granitemoe": (ATTENTION, False),
}
if seen != expected:
    raise SystemExit(f"the behaviour has changed: {seen}")
PYTHON
