"""TRL's trainers for patched models: 4-bit bases, references that are views, what is counted."""

import copy
import functools

import pytest
import torch

import tokengate
from tokengate import TokenGateError

transformers = pytest.importorskip("transformers", reason="the transformers extra is not installed")
trl = pytest.importorskip("trl", reason="the test extra is not installed")
peft = pytest.importorskip("peft", reason="the test extra is not installed")
pytest.importorskip("bitsandbytes", reason="the test extra is not installed")
import quantised_llama as llama  # noqa: E402
from datasets import Dataset  # noqa: E402
from models import away_from_initialisation  # noqa: E402
from places import ROOT  # noqa: E402
from tokenizers import Tokenizer, models, pre_tokenizers  # noqa: E402

from tokengate.integrations.trainer import (  # noqa: E402
    TokenGateCallback,
    TokenGateTrainer,
    attached,
    sparsity_logs,
)
from tokengate.integrations.trl import gated, reference  # noqa: E402

pytestmark = [
    pytest.mark.usefixtures("one_thread", "own_accelerate"),
    # TRL's own, of what transformers renamed and of what PEFT asks for.
    pytest.mark.filterwarnings("ignore:`gradient_checkpointing:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning"),
]

EQUAL = 0.6931472  # -log sigmoid(0): the policy says what its reference says


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    monkeypatch.setenv("CI", "1")  # in which TRL sends no telemetry


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return llama.save_base(tmp_path_factory.mktemp("base"))


def plain(folder):
    return transformers.LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)


def patched(model, **options):
    """With a third of its positions open or so."""
    torch.manual_seed(0)
    options = {"rank": 4, "tau": 0.05, "penalty": 1e-4, **options}
    tokengate.patch(model, ["q_proj", "v_proj", "up_proj"], **options)
    return away_from_initialisation(model, 0.15)


def continued(model, folder, **options):
    """With the adapter that it goes on from, once more beside it."""
    tokengate.save(patched(model, **options), folder)
    tokengate.load(model, folder, name="before")
    return model


def words(count, seed):
    generator = torch.Generator().manual_seed(seed)
    return " ".join(f"w{i}" for i in torch.randint(3, 32, (count,), generator=generator).tolist())


def tokenizer():
    vocabulary = {"<pad>": 0, "<eos>": 1, "<unk>": 2, **{f"w{i}": i for i in range(3, 32)}}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    names = {"pad_token": "<pad>", "eos_token": "<eos>", "unk_token": "<unk>"}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=made, **names)


PROMPTS = [{"prompt": words(4, i)} for i in range(16)]
ANSWERS = [{"chosen": f" {words(5, i)}", "rejected": f" {words(6, -i)}"} for i in range(1, 17)]
DATA = {
    "SFT": [{"text": words(5 + i % 4, i)} for i in range(16)],
    "DPO": [{**prompt, **answers} for prompt, answers in zip(PROMPTS, ANSWERS, strict=True)],
    "KTO": [
        {**PROMPTS[i], "completion": ANSWERS[i]["chosen"], "label": i % 2 == 0} for i in range(16)
    ],
    "GRPO": PROMPTS,
    "RLOO": PROMPTS,
}
COMMON = {
    "use_cpu": True, "report_to": "none", "learning_rate": 1e-2, "bf16": False, "logging_steps": 1,
    "disable_tqdm": True, "per_device_train_batch_size": 4, "dataloader_pin_memory": False,
}  # fmt: skip
SAMPLING = {"num_generations": 2, "max_completion_length": 6}
ONLINE = {"GRPO": SAMPLING, "RLOO": SAMPLING}


def rewards(completions, **_):
    return [float(len(set(each.split()))) for each in completions]


def made(name, model, folder, *, kind=None, more=(), options=None, **given):
    """A trainer of TRL's by the beginning of its name."""
    kind = gated(getattr(trl, f"{name}Trainer")) if kind is None else kind
    arguments = getattr(trl, f"{name}Config")(
        str(folder), **COMMON, **ONLINE.get(name, {}), **{"max_steps": 2, **(options or {})}
    )
    if name in ONLINE:
        given["reward_funcs"] = rewards
    callbacks = given.pop("callbacks", [TokenGateCallback(s=1e-2), *more])
    trainer = kind(
        model, args=arguments, train_dataset=Dataset.from_list(DATA[name]),
        processing_class=tokenizer(), callbacks=callbacks, **given,
    )  # fmt: skip
    trainer.remove_callback(transformers.PrinterCallback)
    return trainer


def logged(trainer, key="loss"):
    if not trainer.state.log_history:
        trainer.train()
    return [entry[key] for entry in trainer.state.log_history if key in entry]


def own(model):
    named = model.named_parameters()
    return {name: p.detach().clone() for name, p in named if p.requires_grad}


def equal(found, expected):
    return found.keys() == expected.keys() and all(
        torch.equal(found[name], value) for name, value in expected.items()
    )


# QLoRA


class Killed(BaseException):
    """As of the process: nothing is done after it."""


class Kill(transformers.TrainerCallback):
    def on_pre_optimizer_step(self, args, state, control, **context):
        if state.global_step == 3:
            raise Killed


def test_qlora_killed_resumed_saved_and_loaded_into_a_fresh_base(folder, tmp_path):
    def trainer(name, more=()):
        options = {"max_steps": 5, "save_strategy": "steps", "save_steps": 2, "warmup_steps": 2}
        model = llama.patched(folder, method="dora")
        return made("SFT", model, tmp_path / name, more=more, options=options)

    whole = trainer("whole")
    start = own(whole.model)
    assert start["model.layers.0.self_attn.q_proj.gate.tau"].item() == pytest.approx(0.3, abs=1e-7)
    whole.train()
    assert equal(start, own(llama.patched(folder, method="dora")))
    with pytest.raises(Killed):
        trainer("killed", [Kill()]).train()
    resumed = trainer("killed")
    resumed.train(resume_from_checkpoint=True)
    expected = own(whole.model)
    assert not any(torch.equal(value, start[name]) for name, value in expected.items())
    assert {value.dtype for value in expected.values()} == {torch.float32}
    assert equal(own(resumed.model), expected)

    resumed.save_model(tmp_path / "adapter")
    fresh = llama.base(folder)
    ids = torch.randint(3, 32, (4, 8))
    with torch.no_grad():
        before = fresh(ids).logits
        trained = resumed.model.eval()(ids).logits
        tokengate.load(fresh, tmp_path / "adapter")
        loaded = fresh.eval()(ids).logits
    assert (trained - before).abs().max() > 1e-2
    assert torch.equal(loaded, trained)


def test_without_it_a_quantised_model_is_refused_and_rounded(folder, tmp_path):
    model = llama.patched(folder)
    start, tau = own(model), tokengate.layers(model)["model.layers.0.mlp.up_proj"].gate.tau
    with attached(model):
        made("SFT", model, tmp_path, kind=trl.SFTTrainer)
    assert equal(own(model), start)
    with pytest.raises(ValueError, match="purely quantized"):
        made("SFT", model, tmp_path, kind=trl.SFTTrainer)
    assert tau.item() == 0.30078125


@pytest.mark.parametrize("name", ["SFT", "DPO", "GRPO"])
def test_peft_is_not_put_around_it(folder, tmp_path, name):
    kind = getattr(trl, f"{name}Trainer")
    lora = peft.LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM")
    for each in (kind, gated(kind)):
        with pytest.raises(TokenGateError, match=r"tokengate has patched.*peft_config="):
            made(name, patched(plain(folder)), tmp_path, kind=each, peft_config=lora)


def test_any_trainer_s_class():
    assert gated(trl.SFTTrainer) is gated(trl.SFTTrainer)
    for kind in (transformers.Trainer, transformers.Seq2SeqTrainer, TokenGateTrainer):
        assert issubclass(gated(kind), kind)
        assert issubclass(gated(kind), TokenGateTrainer)


# References


def test_the_base_model_as_reference_is_a_second_model_s(folder, tmp_path):
    two = made("DPO", patched(plain(folder)), tmp_path, ref_model=plain(folder))
    one = made("DPO", patched(plain(folder)), tmp_path)
    assert abs(logged(two)[0] - EQUAL) > 1e-2
    assert logged(one) == logged(two)
    assert equal(own(one.model), own(two.model))
    bare = patched(plain(folder))
    assert logged(made("DPO", bare, tmp_path, kind=trl.DPOTrainer, ref_model=reference(bare))) == (
        logged(two)
    )


class Wrapper(torch.nn.Module):
    """What one would write: TRL takes another forward in place of this one."""

    def __init__(self, model):
        super().__init__()
        self.model, self.config, self.base_model = model, model.config, model.base_model

    def get_output_embeddings(self):
        return self.model.get_output_embeddings()

    def forward(self, *args, **kwargs):
        with tokengate.disabled(self.model):
            return self.model(*args, **kwargs)


def test_what_enters_the_context_in_its_forward_is_no_reference(folder, tmp_path):
    model = patched(plain(folder))
    wrapped = made("DPO", model, tmp_path, ref_model=Wrapper(model), options={"max_steps": 1})
    assert logged(wrapped) == pytest.approx([EQUAL], abs=1e-6)


def test_it_goes_on_from_an_adapter(folder, tmp_path):
    model = continued(llama.base(folder), tmp_path / "sft")  # of 4 bits
    before = reference(model, "before")
    losses = logged(made("DPO", model, tmp_path, ref_model=before))
    assert losses[0] == pytest.approx(EQUAL, abs=1e-6)
    assert abs(losses[1] - EQUAL) > 1e-3
    # Computed ahead, and kept in a file by a hash of the reference.
    tokengate.load(model, tmp_path / "sft", name="default")
    ahead = {"precompute_ref_log_probs": True}
    assert logged(made("DPO", model, tmp_path, options=ahead, ref_model=before)) == losses
    tokengate.load(model, tmp_path / "sft", name="default")
    against_base = made("DPO", model, tmp_path, options={**ahead, "max_steps": 1})
    assert abs(logged(against_base)[0] - EQUAL) > 1e-2


def test_kto(folder, tmp_path):
    once = {"max_steps": 1}
    two = made("KTO", patched(plain(folder)), tmp_path, ref_model=plain(folder), options=once)
    one = made("KTO", patched(plain(folder)), tmp_path, options=once)
    assert one.ref_model.device == one.model.device
    assert abs(logged(one)[0] - 0.5) > 1e-3  # as it is where the policy is the reference
    assert logged(one) == logged(two)


def counted(monkeypatch, trainer):
    """Positions that are logged of each step, that the schedule saw, and that have gradients."""
    logged_positions, seen, learnt, texts = [], [], [], []
    report_of, model = sparsity_logs.report_of, trainer.model

    def reported(recorder):
        report = report_of(recorder)
        logged_positions.append({m.positions for m in report.modules.values()})
        return report

    def called(module, args, given):
        if torch.is_grad_enabled():
            learnt.append(int(given["attention_mask"].sum()))
            texts.append({len(given["attention_mask"])})

    class Look(transformers.TrainerCallback):
        def on_pre_optimizer_step(self, *_, **__):
            gates = [layer.gate for layer in tokengate.layers(model).values()]
            seen.append({round(float(gate._seen.sum())) for gate in gates})

    monkeypatch.setattr(sparsity_logs, "report_of", reported)
    model.model.register_forward_pre_hook(called, with_kwargs=True)
    trainer.add_callback(Look())
    with tokengate.record(model) as everything:
        trainer.train()
    run = {m.positions for m in everything.report().modules.values()}
    assert all(each > 1.5 * sum(learnt) for each in run)
    assert seen == texts  # whose scores weigh 1 together
    return logged_positions, [{each} for each in learnt]


@pytest.mark.parametrize(("name", "reentrant"), [("GRPO", True), ("RLOO", False)])
def test_rollouts_and_references_are_not_counted(folder, tmp_path, monkeypatch, name, reentrant):
    model = continued(plain(folder), tmp_path / "sft", tau=0.0)  # as a schedule begins
    options = {"beta": 0.1, "gradient_checkpointing_kwargs": {"use_reentrant": reentrant}}
    callbacks = [TokenGateCallback(target_sparsity=0.5)]
    before = reference(model, "before")
    trainer = made(
        name, model, tmp_path, options=options, callbacks=callbacks, ref_model=before
    )  # fmt: skip
    assert trainer.ref_model is before
    positions, learnt = counted(monkeypatch, trainer)
    assert positions == learnt
    assert logged(trainer, "kl")[0] == pytest.approx(0, abs=1e-6)


def test_a_trainer_s_own_reference_is_a_view_too(folder, tmp_path):
    found = {}
    for reference_model in (plain(folder), None):
        model = patched(plain(folder))
        options = {"beta": 0.1}
        trainer = made("GRPO", model, tmp_path, options=options, ref_model=reference_model)
        assert bool(list(trainer.ref_model.parameters())) == (reference_model is not None)
        found[reference_model] = logged(trainer, "kl"), logged(trainer), own(model)
    (kl, losses, values), (kl_of_view, losses_of_view, values_of_view) = found.values()
    assert abs(kl[0]) > 1e-3
    assert (kl_of_view, losses_of_view) == (kl, losses)
    assert equal(values_of_view, values)
    theirs = trl.trainer.grpo_trainer.create_model_from_path
    assert theirs is trl.trainer.utils.create_model_from_path  # again


def test_refused(folder, tmp_path):
    model = continued(plain(folder), tmp_path / "sft")
    with pytest.raises(TokenGateError, match="without a patched layer"):
        reference(plain(folder))
    with pytest.raises(TokenGateError, match="given 'after', and the model's adapters"):
        reference(model, "after")
    with pytest.raises(TokenGateError, match="in use and so is what is trained"):
        reference(model, "default")
    with pytest.raises(TokenGateError, match=r"trains 'lm_head\.weight' beside its adapters"):
        reference(tokengate.patch(plain(folder), ["q_proj"], train=["lm_head"]))
    with pytest.raises(TokenGateError, match="GRPOTrainer that compares with no reference"):
        made("GRPO", model, tmp_path, ref_model=reference(model), options={"beta": 0.0})
    with pytest.raises(TokenGateError, match="view of its own model"):
        made("DPO", patched(plain(folder)), tmp_path, options={"sync_ref_model": True})
    with pytest.raises(TokenGateError, match=r"a class that inherits from transformers\.Trainer"):
        gated("SFTTrainer")
    with pytest.raises(TokenGateError, match="no TokenGateCallback"):
        made("SFT", model, tmp_path, callbacks=[]).train()


def test_whatever_is_called_by_way_of_a_view_runs_as_the_reference(folder, tmp_path):
    model = continued(plain(folder), tmp_path / "sft", dropout=0.5).train()
    base, ids = plain(folder).eval(), torch.randint(3, 32, (2, 6))
    for name, other in (("before", copy.deepcopy(model).eval()), (None, base)):
        view = reference(model, name)
        away_from_initialisation(model, 0.15)
        with torch.no_grad():
            expected = other(ids).logits
            assert (model(ids).logits - expected).abs().max() > 1e-2
        state, modes = own(model), [module.training for module in model.modules()]
        with tokengate.record(model) as seen:
            found = [
                view(ids).logits,
                view(input_ids=ids).logits,
                view.forward(ids).logits,
                view.lm_head(view.model(ids).last_hidden_state),
                view.get_output_embeddings()(view.base_model(ids)[0]),
                view.get_decoder()(ids).last_hidden_state @ view.lm_head.weight.T,
            ]
        with pytest.raises(TokenGateError, match="nothing was recorded"):
            seen.report()
        for logits in found:
            assert not logits.requires_grad
            torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)
        options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
        assert torch.equal(view.generate(ids, **options), other.generate(ids, **options))
        assert len(view.model.layers) == len(model.model.layers)
        inner = [view.model.layers[0], *view.model.layers]
        assert all(type(each) is type(view) for each in inner)
        assert copy.deepcopy(view)._model is model
        with pytest.raises(TokenGateError, match="a view has none of its own"):
            view.lm_head = torch.nn.Linear(2, 2)
        view.requires_grad_(False).to(torch.float64).train()
        assert equal(own(model), state)
        assert modes == [module.training for module in model.modules()]


def test_the_example_of_the_integrations_readme(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tokenizer().save_pretrained(folder)
    base = llama.base(folder)
    monkeypatch.setattr(
        transformers.AutoModelForCausalLM, "from_pretrained", lambda name, **given: base
    )
    text = (ROOT / "integrations" / "README.md").read_text()
    code = text.split("## TRL\n")[1].split("```python\n")[1].split("```")[0]
    imported = "from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer\n"
    assert imported in code
    scope = {"texts": Dataset.from_list(DATA["SFT"]), "pairs": Dataset.from_list(DATA["DPO"])}
    for name in ("SFT", "DPO"):
        scope[f"{name}Trainer"] = getattr(trl, f"{name}Trainer")
        config = getattr(trl, f"{name}Config")
        scope[f"{name}Config"] = functools.partial(config, max_steps=2, **COMMON)
    exec(code.replace(imported, ""), scope)
    assert logged(scope["dpo"])[0] == pytest.approx(EQUAL, abs=1e-6)
