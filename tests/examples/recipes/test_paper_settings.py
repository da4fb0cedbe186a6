"""The paper's settings at their size, on the meta device: what is patched and what it costs.

Of LLaMA3-8B, section 4.1 and Table 6: 32 layers, hidden 4096, MLP 14336, 32 heads, 8 of keys and
values, 128256 words, and a head of its own.
"""

import importlib
import sys

import pytest
from places import RECIPES

pytest.importorskip("tokenizers", reason="the examples extra is not installed")
pytestmark = pytest.mark.usefixtures("one_thread")

LAYERS, HIDDEN, MLP, KEYS, WORDS = 32, 4096, 14336, 8 * 128, 128256
# in, out of q, k, v, up, down
SIZES = [(HIDDEN, HIDDEN), (HIDDEN, KEYS), (HIDDEN, KEYS), (HIDDEN, MLP), (MLP, HIDDEN)]
# Words in and out; q, o, k, v; gate, up, down; two norms a layer and one at the end.
BASE = 2 * WORDS * HIDDEN + HIDDEN
BASE += LAYERS * (2 * HIDDEN**2 + 2 * HIDDEN * KEYS + 3 * HIDDEN * MLP + 2 * HIDDEN)
MODIFICATIONS = {
    # A and B
    "lora": LAYERS * sum(32 * (i + o) for i, o in SIZES),
    # and a magnitude for each output
    "dora": LAYERS * sum(32 * (i + o) + o for i, o in SIZES),
    # P and Q of twice the rank, and as many singular values
    "adalora": LAYERS * sum(64 * (i + o) + 64 for i, o in SIZES),
}
PRINTED = {"lora": 56_623_104, "dora": 57_409_536, "adalora": 113_256_448}


@pytest.fixture(scope="module")
def commonsense():
    sys.path.insert(0, str(RECIPES))
    yield importlib.import_module("commonsense")
    sys.path.remove(str(RECIPES))
    for name in (
        "commonsense",
        "commonsense_data",
        "commonsense_model",
        "recipe",
        "recipe_results",
    ):
        sys.modules.pop(name, None)


@pytest.mark.parametrize("method", MODIFICATIONS)
def test_llama_3_8b_is_patched_as_in_table_6(commonsense, monkeypatch, capsys, method):
    plans = []
    recipe = commonsense.recipe
    counted = recipe.count_patched
    monkeypatch.setattr(
        recipe, "count_patched", lambda model: plans.append(counted(model)) or plans[-1]
    )
    monkeypatch.setattr(
        sys, "argv", ["commonsense.py", "--plan", "--gate", "on", "--method", method]
    )
    commonsense.main()
    (plan,) = plans
    trained = MODIFICATIONS[method] + 160
    assert MODIFICATIONS[method] == PRINTED[method]
    assert BASE == 8_030_261_248
    assert (plan["modifications"], plan["taus"], plan["trainable"]) == (
        MODIFICATIONS[method], 160, trained,
    )  # fmt: skip
    assert plan["parameters"] == BASE + trained
    names = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.up_proj"]
    names += ["mlp.down_proj"]
    assert set(plan["layers"]) == {f"model.layers.{n}.{name}" for n in range(32) for name in names}
    assert plan["trained_beside"] == {}
    # The base in bfloat16, what is trained in float32: itself, its gradient and Adam's two states.
    assert plan["bytes"] == {
        "frozen parameters": 2 * BASE, "trained parameters": 4 * trained,
        "gradients": 4 * trained, "Adam's states": 8 * trained,
    }  # fmt: skip
    text = capsys.readouterr().out
    assert f"{method}-on-0" in text
    assert "160 layers would be patched" in text
    assert f"{trained:,} of {BASE + trained:,} parameters trained" in text
    assert "together, without activations" in text
