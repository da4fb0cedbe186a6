"""Lightning's Trainer with the callback: tau's rule, lambda's unit, clipping, logs, checkpoints."""

import copy
import importlib
import json
import os
import subprocess
import sys
import warnings

import pytest
import torch
from models import Net, away_from_initialisation
from places import ROOT

import tokengate

pytest.importorskip("lightning", reason="needs lightning")
pytestmark = pytest.mark.filterwarnings(
    "ignore::lightning.fabric.utilities.warnings.PossibleUserWarning",
    "ignore::lightning_fabric.utilities.warnings.PossibleUserWarning",
    "ignore:.*isinstance.treespec, LeafSpec.*",
    "ignore:.*litlogger.*",
    "ignore:Checkpoint directory .* exists",
)

S, LR = 2e-3, 1e-2


@pytest.fixture(scope="module", params=["lightning.pytorch", "pytorch_lightning"])
def both(request):
    return importlib.import_module(request.param)


@pytest.fixture(scope="module")
def pl():
    return importlib.import_module("lightning.pytorch")


def patched(method="lora", **options):
    torch.manual_seed(0)
    model = tokengate.patch(Net(), ["q_proj", "v_proj"], method, penalty=1e-3, **options)
    return away_from_initialisation(model, 0.3)


def batches(count=8):
    torch.manual_seed(1)
    return torch.utils.data.DataLoader(torch.randn(2 * count, 5, 8), batch_size=2)


def taus(model):
    return torch.cat([g.gate.tau.detach().clone() for g in tokengate.layers(model).values()])


def module_of(pl, net, make=None, *, manual=False, orthogonality=0.0, clip=None):
    """A LightningModule around a patched net; `make` gives its optimiser, AdamW otherwise."""

    class Module(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = net
            self.automatic_optimization = not manual
            self.norms = []
            self.losses = []

        def configure_optimizers(self):
            groups = tokengate.param_groups(self, LR, S)
            return torch.optim.AdamW(groups[:1]) if make is None else make(groups)

        def training_step(self, batch, _):
            loss = self.net(batch).square().mean()
            if orthogonality:
                loss = loss + orthogonality * tokengate.orthogonality(self.net)
            self.losses.append(loss.item())
            if not manual:
                return loss
            optimizer = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(loss)
            if clip is not None:
                self.clip_gradients(optimizer, clip, "norm")
            optimizer.step()

        def validation_step(self, batch, _):
            self.net(batch)

    return Module()


def trainer_of(pl, callback, folder=None, **options):
    options = {"max_epochs": 1, "logger": False, "enable_checkpointing": False, **options}
    return pl.Trainer(
        callbacks=[] if callback is None else [callback], accelerator="cpu",
        enable_progress_bar=False, enable_model_summary=False, default_root_dir=folder,
        **{"devices": 1, **options},
    )  # fmt: skip


def callback(pl, **options):
    module = importlib.import_module("tokengate.integrations.lightning_callback")
    return module.TokenGateCallback(**options)


def loop(net, steps=8, clip=None, micro=1, scale=1.0):
    """The same in a loop of one's own."""
    optimizer = torch.optim.AdamW(tokengate.param_groups(net, LR, S))
    data = [*batches(steps * micro)]
    for step in range(steps):
        optimizer.zero_grad()
        for part in data[step * micro : (step + 1) * micro]:
            (net(part).square().mean() / micro).backward()
        if clip is not None:
            tokengate.clip_grad_norm_(net, clip)
        optimizer.step()
    return taus(net)


@pytest.mark.parametrize("held", [True, False])
@pytest.mark.parametrize("manual", [False, True])
def test_it_trains_as_a_loop_with_param_groups_does(both, tmp_path, manual, held):
    """tau within the groups, as hidden from what Lightning clips, or without."""
    wanted_net = patched()
    wanted = loop(wanted_net, clip=0.05)
    net = patched()
    make = torch.optim.AdamW if held else None
    module = module_of(both, net, make, manual=manual, clip=0.05)
    clip = {} if manual else {"gradient_clip_val": 0.05}
    trainer = trainer_of(both, callback(both), tmp_path, **clip)
    trainer.fit(module, batches())
    assert torch.allclose(taus(net), wanted, rtol=1e-4)
    for one, other in zip(net.parameters(), wanted_net.parameters(), strict=True):
        assert torch.allclose(one, other, rtol=1e-3, atol=1e-6)
    assert "clip_gradients" not in vars(trainer.precision_plugin)
    assert all(layer.gate._unit is None for layer in tokengate.layers(net).values())


def norm_of_one_step(pl, tmp_path, monkeypatch, own):
    """What Lightning clips by."""
    net, norms, plain = patched(), [], torch.nn.utils.clip_grad_norm_
    with monkeypatch.context() as patch:
        patch.setattr(
            torch.nn.utils, "clip_grad_norm_", lambda *a, **k: norms.append(plain(*a, **k))
        )
        trainer = trainer_of(pl, own, tmp_path, gradient_clip_val=1e-3, max_steps=1)
        trainer.fit(module_of(pl, net, torch.optim.AdamW), batches())
    return float(norms[0])


def test_the_clipping_norm_has_the_taus_in_it_without_the_callback(pl, tmp_path, monkeypatch):
    twin = patched()
    twin(next(iter(batches()))).square().mean().backward()
    wanted = float(tokengate.clip_grad_norm_(twin, 1e9))
    with_it = norm_of_one_step(pl, tmp_path, monkeypatch, callback(pl))
    without = norm_of_one_step(pl, tmp_path, monkeypatch, None)
    assert with_it == pytest.approx(wanted, rel=1e-5)
    assert without > 1.01 * wanted


@pytest.mark.filterwarnings("ignore::tokengate.errors.LeftOutWarning")  # by the loop
def test_schedulers_and_swa_with_one_number(pl, tmp_path):
    net, path = patched(), []

    class Watch(pl.Callback):
        def on_train_batch_end(self, *_):
            path.append((taus(net), optimizers[0].param_groups[-1]["lr"]))

    optimizers = []

    def make(groups):
        optimizers.append(torch.optim.SGD(groups, lr=1e-9))
        cycle = torch.optim.lr_scheduler.OneCycleLR(optimizers[0], 1e-9, total_steps=20)
        return optimizers, [cycle]

    trainer = trainer_of(pl, callback(pl), tmp_path, max_epochs=3)
    trainer.callbacks += [
        pl.callbacks.StochasticWeightAveraging(0.5e-9, swa_epoch_start=1),
        Watch(),
    ]
    trainer.fit(module_of(pl, net, make), batches(4))
    rates = [lr for _, lr in path]  # of the group of the taus alone
    assert len(set(rates)) > 1
    assert max(rates) < 1e-8 < S
    # Nothing but tau moves at this rate, so that a loop says where it goes.
    twin = patched()
    optimizer = tokengate.TauAdam([g.gate.tau for g in tokengate.layers(twin).values()], s=S)
    for step, batch in enumerate([*batches(4)] * 3):
        optimizer.zero_grad()
        twin(batch).square().mean().backward()
        optimizer.step()
        assert torch.allclose(path[step][0], taus(twin), rtol=1e-4)


@pytest.mark.parametrize("held", [True, False])
def test_accumulated_and_in_16_mixed(pl, tmp_path, held):
    make = torch.optim.AdamW if held else None
    net, exact = patched(), loop(patched(), steps=4, micro=2)
    own = callback(pl)
    trainer = trainer_of(pl, own, tmp_path, accumulate_grad_batches=2)
    trainer.fit(module_of(pl, net, make), batches(8))
    assert torch.allclose(taus(net), exact, rtol=1e-5)
    half = patched()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=2)
    amp = pl.plugins.MixedPrecision("16-mixed", "cpu", scaler)
    trainer = trainer_of(pl, callback(pl), tmp_path, accumulate_grad_batches=2, plugins=[amp])
    module = module_of(pl, half, make)
    with pytest.MonkeyPatch.context() as patch:  # float32 within, under the scaler
        patch.setattr(amp, "autocast_context_manager", lambda: torch.autocast("cpu", enabled=False))
        trainer.fit(module, batches(8))
    assert scaler.get_scale() > 2.0**10
    assert torch.allclose(taus(half), exact, rtol=1e-4)


def test_two_processes_train_as_one_does(tmp_path):
    """Without lambda's unit they are 2e-4 apart."""
    script = ROOT / "tests" / "integrations" / "two_lightning_processes.py"
    paths = os.pathsep.join(map(str, (ROOT, ROOT / "tests", script.parent)))
    environment = {**os.environ, "PYTHONPATH": paths}
    path = tmp_path / "taus.json"
    subprocess.run([sys.executable, script, path], env=environment, check=True, timeout=300)
    found = torch.tensor(json.loads(path.read_text()))
    assert torch.allclose(found, loop(patched(), steps=4, micro=2), rtol=0, atol=1e-6)


def is_settled(trained, steps, of):
    """Whether it was called in so many steps, and then with those of the last in whole passes."""
    passes = (len(trained) - steps) // of
    return passes >= 1 and trained == [True] * steps + [False] * of * passes


def test_a_skipped_step_is_no_step_of_anything(pl, tmp_path):
    net = patched("adalora", rank=4, target_rank=2)

    class Overflows(pl.Callback):
        def on_after_backward(self, trainer, module):
            if trainer.global_step == 2 and scaler.get_scale() == 1024.0:
                net.blocks[0].q_proj.modification.P.grad.fill_(torch.inf)

    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    amp = pl.plugins.MixedPrecision("16-mixed", "cpu", scaler)
    own = callback(pl, target_sparsity=0.5, allocator={"total_steps": 10})
    trainer = trainer_of(pl, own, tmp_path, plugins=[amp])
    trainer.callbacks.append(Overflows())
    trained = []
    net.register_forward_hook(lambda net, *_: trained.append(net.training))
    trainer.fit(module_of(pl, net), batches(12))
    assert scaler.get_scale() == 512.0
    assert own.allocator.steps == own.sparsity_schedule.steps == own.following.begun == 11
    assert is_settled(trained, 12, of=11), "the schedule has ended with the training"
    assert all(layer.gate._seen is None for layer in tokengate.layers(net).values())
    assert all(p.isfinite().all() for p in net.parameters())


def resumable(pl, tmp_path, name, ckpt=None, epochs=4, **options):
    net = patched("adalora", rank=4, target_rank=2)
    own = callback(pl, target_sparsity=0.5, allocator={"total_steps": 12, "interval": 1})
    keep = pl.callbacks.ModelCheckpoint(
        tmp_path / name, filename="{epoch}", save_top_k=-1, save_last=False
    )
    trainer = pl.Trainer(
        callbacks=[own, keep], max_epochs=epochs, accelerator="cpu", devices=1, logger=False,
        enable_progress_bar=False, enable_model_summary=False, **options,
    )  # fmt: skip
    trainer.fit(module_of(pl, net), batches(4), ckpt_path=ckpt)
    return net, own


# Of ten positions a step, while ranks fall.
@pytest.mark.filterwarnings("ignore::tokengate.errors.UnreachedSparsityWarning")
def test_resumed_bit_for_bit(both, tmp_path):
    """Ranks of {2, 2} became {4, 0}."""
    whole, own = resumable(both, tmp_path, "whole")
    checkpoint = tmp_path / "whole" / "epoch=1.ckpt"
    again, other = resumable(both, tmp_path, "whole", ckpt=checkpoint)
    assert set(own.allocator.ranks.values()) != {4}
    assert other.allocator.ranks == own.allocator.ranks
    assert other.allocator.steps == own.allocator.steps == 16
    assert other.sparsity_schedule.thresholds == own.sparsity_schedule.thresholds
    assert min(own.sparsity_schedule.thresholds.values()) > 0
    for name, value in whole.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name


@pytest.mark.parametrize("settle", [True, False])
def test_a_schedule_after_a_share_of_the_steps_and_with_its_end(pl, tmp_path, settle):
    net, trained = patched(), []
    net.register_forward_hook(lambda net, *_: trained.append(net.training))
    own = callback(pl, target_sparsity=0.5, target_warmup=0.5, settle=settle)
    trainer_of(pl, own, tmp_path).fit(module_of(pl, net), batches(8))
    assert own.sparsity_schedule.wanted_at(4) == 0 < own.sparsity_schedule.wanted_at(5)
    assert is_settled(trained, 8, of=8) if settle else trained == [True] * 8


def stops(pl, step):
    class Stops(pl.Callback):
        def on_train_batch_end(self, trainer, *_):
            trainer.should_stop = trainer.global_step == step

    return Stops()


@pytest.mark.filterwarnings("ignore:SparsitySchedule was to close")
def test_a_training_that_stops_after_the_target_is_settled(pl, tmp_path):
    net, trained = patched(), []
    net.register_forward_hook(lambda net, *_: trained.append(net.training))
    trainer = trainer_of(pl, callback(pl, target_sparsity=0.5), tmp_path)
    trainer.callbacks.append(stops(pl, 16))
    trainer.fit(module_of(pl, net), batches(20))
    assert is_settled(trained, 16, of=16)


def test_a_training_that_stops_before_the_target_is_told_of(pl, tmp_path):
    trainer = trainer_of(pl, callback(pl, target_sparsity=0.5), tmp_path)
    trainer.callbacks.append(stops(pl, 2))
    with pytest.warns(tokengate.errors.UnreachedSparsityWarning) as told:
        trainer.fit(module_of(pl, patched()), batches())
    said = [str(each.message) for each in told if "the model is that of" in str(each.message)]
    assert ["step 2 of 8, where" in each for each in said] == [True]


# Of ten positions a step, too.
@pytest.mark.filterwarnings("ignore:SparsitySchedule was to close")
@pytest.mark.parametrize("last", [True, False])
@pytest.mark.parametrize("average", ["StochasticWeightAveraging", "EMAWeightAveraging", None])
def test_averages_of_thresholds_are_told_of(pl, tmp_path, average, last):
    """Whichever callback Lightning asks first at the end."""
    options = {"StochasticWeightAveraging": {"swa_lrs": LR}, "EMAWeightAveraging": {"decay": 0.9}}
    trainer = trainer_of(pl, callback(pl, target_sparsity=0.5), tmp_path, max_epochs=3)
    if average is not None:
        own = getattr(pl.callbacks, average)(**options[average])
        trainer.callbacks.insert(len(trainer.callbacks) if last else 0, own)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.fit(module_of(pl, patched()), batches())
    told = [str(w.message) for w in caught if "has replaced its thresholds" in str(w.message)]
    assert len(told) == (average is not None)
    assert all(each.endswith("warm_start=True).") for each in told)


@pytest.mark.filterwarnings("ignore::tokengate.errors.LeftOutWarning")
def test_a_checkpoint_without_the_callback(pl, tmp_path):
    net = patched("adalora", rank=4, target_rank=2)
    trainer = trainer_of(pl, None, tmp_path)
    trainer.fit(module_of(pl, net, orthogonality=0.1), batches(2))
    trainer.save_checkpoint(tmp_path / "plain.ckpt")
    own = callback(pl, allocator={"total_steps": 12})
    with pytest.raises(tokengate.TokenGateError, match=r"(no state of the|saved without)"):
        trainer_of(pl, own, tmp_path, max_epochs=2).fit(
            module_of(pl, copy.deepcopy(net)), batches(2), ckpt_path=tmp_path / "plain.ckpt"
        )


def test_what_is_logged(pl, tmp_path):
    net = patched(tau=0.2)
    seen = []

    class Kept(pl.loggers.logger.DummyLogger):
        def log_metrics(self, metrics, step=None):
            seen.append({**metrics})

    module = module_of(pl, net)
    trainer = trainer_of(
        pl, callback(pl), tmp_path, logger=Kept(), log_every_n_steps=4, max_epochs=1,
        num_sanity_val_steps=1,
    )  # fmt: skip
    trainer.fit(module, batches(8), batches(2))
    training = [m for m in seen if "sparsity" in m]
    assert len(training) == 2
    assert training[-1].keys() >= {"sparsity", "tau_mean", "tau_min", "tau_max"}
    assert training[-1]["tau_mean"] == pytest.approx(taus(net).mean().item())
    assert 0 < training[0]["sparsity"] < 1
    with tokengate.record(net) as rec, torch.no_grad():
        for batch in batches(2):
            net.eval()(batch)
    (validated,) = [m for m in seen if "val_sparsity" in m]
    assert validated["val_sparsity"] == pytest.approx(rec.report().sparsity)


def test_the_penalty_of_adalora_is_added_once(pl, tmp_path):
    ends = []
    for weight, in_loss in ((0.1, 0.0), (0.0, 0.1)):
        net = patched("adalora", rank=4, target_rank=2)
        own = callback(pl, orthogonality=weight)
        options = {"accumulate_grad_batches": 1, "gradient_clip_val": 0.05}
        trainer_of(pl, own, tmp_path, **options).fit(
            module_of(pl, net, orthogonality=in_loss), batches()
        )
        ends.append(net)
    for one, other in zip(ends[0].parameters(), ends[1].parameters(), strict=True):
        assert torch.allclose(one, other, rtol=1e-3, atol=1e-5)


def test_refusals(pl, tmp_path):
    plain = module_of(pl, Net(), lambda g: torch.optim.SGD(g, lr=0.1))
    plain.configure_optimizers = lambda: torch.optim.SGD(plain.parameters(), lr=0.1)
    with pytest.raises(tokengate.TokenGateError, match="without a patched layer"):
        trainer_of(pl, callback(pl), tmp_path).fit(plain, batches())
    net = patched()
    head = module_of(pl, net)
    head.configure_optimizers = lambda: torch.optim.SGD(net.head.parameters(), lr=0.1)
    with pytest.raises(tokengate.TokenGateError, match="none of the optimizers"):
        trainer_of(pl, callback(pl), tmp_path).fit(head, batches())
    with pytest.raises(tokengate.TokenGateError, match="eps=0 is not above 0"):
        callback(pl, eps=0)
    with pytest.raises(tokengate.TokenGateError, match=r"target_sparsity=0\.0 is not between"):
        callback(pl, target_sparsity=0.0)
    with pytest.raises(tokengate.TokenGateError, match="no effect without target_sparsity="):
        callback(pl, target_warmup=3)
    with pytest.raises(tokengate.TokenGateError, match="settle=False, which has no effect without"):
        callback(pl, settle=False)
    whole = module_of(pl, patched(), lambda g: torch.optim.SGD(g, lr=0.1))
    lowering = trainer_of(pl, callback(pl, allocator={"interval": 2}), tmp_path)
    with pytest.raises(tokengate.TokenGateError, match=r"allocator=.* without AdaLoRA layers"):
        lowering.fit(whole, batches())
