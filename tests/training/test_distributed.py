"""DDP, FSDP2, Accelerate and ZeRO: two processes train what one trains on the whole batch."""

import distributed_runs as runs
import pytest
import torch
import two_ranks

import tokengate

pytestmark = pytest.mark.usefixtures("one_thread")

ENGINES = ["ddp", "fsdp2"]


@pytest.fixture(scope="module")
def found(processes, tmp_path_factory):
    """What each rank found, by engine; and where."""
    folders = {engine: tmp_path_factory.mktemp(engine) for engine in ENGINES}
    started = {e: two_ranks.start(processes, runs.everything, folders[e], e) for e in ENGINES}
    for ranks in started.values():
        two_ranks.wait_for(ranks)
    return {e: (both(folder), folder) for e, folder in folders.items()}


def both(folder):
    return [torch.load(folder / f"{rank}.pt") for rank in (0, 1)]


def distance(one, other):
    return (torch.as_tensor(one) - torch.as_tensor(other)).abs().max().item()


@pytest.mark.parametrize("method", runs.METHODS)
@pytest.mark.parametrize("engine", ENGINES)
def test_two_processes_are_one(found, engine, method):
    (first, second), _ = found[engine]
    one, ours = runs.training(method, ""), first[method]
    assert distance(first[f"{method} without the unit"]["taus"], one["taus"]) > 1e-3
    assert distance(one["taus"][-1], one["taus"][0]) > 0.01
    assert distance(ours["taus"], one["taus"]) < 1e-6
    assert distance(ours["losses"], one["losses"]) < 1e-6
    assert 0.01 < one["recorded"] < 0.99
    assert ours["recorded"] == pytest.approx(one["recorded"], abs=1e-12)
    for what in ("taus", "losses", "recorded"):
        assert ours[what] == second[method][what]


@pytest.mark.parametrize("engine", ENGINES)
def test_adalora_s_masks_are_one_process_s(found, engine):
    """Over an allocator whose state is saved half-way and loaded into a new one."""
    (first, second), _ = found[engine]
    one, ours = runs.training("adalora", ""), first["adalora"]
    kept = [sum(map(sum, masks.values())) for masks in one["masks"]]
    assert kept[0] == 24
    assert kept[-1] == 12
    assert len({tuple(mask) for mask in one["masks"][-1].values()}) > 1
    assert ours["masks"] == second["adalora"]["masks"] == one["masks"]
    for what in ("sensitivity", "uncertainty"):
        for name, factors in one["allocator"][what].items():
            for factor, expected in factors.items():
                got = ours["allocator"][what][name][factor]
                assert type(got) is torch.Tensor
                torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize("per_layer", [False, True])
@pytest.mark.parametrize("engine", ENGINES)
def test_one_schedule_on_all_ranks(found, engine, per_layer):
    (first, second), _ = found[engine]
    options = {"per_layer": per_layer, "warmup_steps": 2}
    one = runs.training("lora", "", schedule=options)
    ours = first[f"per_layer={per_layer}"]
    assert ours["thresholds"] == second[f"per_layer={per_layer}"]["thresholds"]
    assert distance(one["thresholds"], 0.0) > 1e-2
    # The last ones are not those that were followed, but told anew, on all ranks.
    followed = runs.training("lora", "", schedule={**options, "settle": False})
    assert distance(one["thresholds"][-1], followed["thresholds"][-1]) > 1e-4
    assert ours["error"] == pytest.approx(one["error"], rel=1e-3)
    assert one["error"] > 1e-3
    assert ours["sparsity"] == pytest.approx(one["sparsity"], abs=1e-6)
    assert distance(ours["thresholds"], one["thresholds"]) < 1e-6
    assert distance(ours["taus"], one["taus"]) < 1e-6


def test_calibrated_by_the_batches_of_all_ranks(found):
    (first, second), _ = found["ddp"]
    (alone, together), (other, others) = first["calibrated"], second["calibrated"]
    assert distance(alone, other) > 1e-4
    assert distance(together, others) == 0.0
    assert distance(together, runs.calibrated("", reduce=True)) == 0.0


@pytest.mark.parametrize("engine", ENGINES)
def test_a_16_bit_base(found, engine):
    (first, second), _ = found[engine]
    one = runs.training("lora", "", dtype=torch.bfloat16)
    assert first["bfloat16"]["taus"] == second["bfloat16"]["taus"]
    # The low-rank gradients of 16 bits are summed in another order.
    assert distance(first["bfloat16"]["taus"], one["taus"]) < 1e-3
    assert distance(one["taus"][-1], one["taus"][0]) > 0.01


@pytest.mark.parametrize("engine", ENGINES)
def test_checkpointing(found, engine):
    (first, _), _ = found[engine]
    one, ours = runs.training("dora", "", schedule={}), first["checkpointed"]
    assert 0 < one["sparsity"][-1] < 1
    assert ours["sparsity"] == pytest.approx(one["sparsity"], abs=1e-6)
    assert distance(ours["taus"], one["taus"]) < 1e-6
    assert distance(ours["losses"], one["losses"]) < 1e-6


def test_a_mesh_of_two_dimensions(found):
    (first, second), _ = found["fsdp2"]
    one, ours = runs.training("adalora", "", schedule={}), first["hsdp"]
    assert ours["masks"] == second["hsdp"]["masks"] == one["masks"]
    for what in ("losses", "taus", "thresholds"):
        assert distance(ours[what], one[what]) < 1e-6


@pytest.mark.parametrize("engine", ENGINES)
def test_tau_adam(found, engine):
    (first, _), _ = found[engine]
    one = runs.training("lora", "", adam=True)
    assert distance(first["TauAdam"]["taus"], one["taus"]) < 1e-6


@pytest.mark.parametrize("engine", ENGINES)
def test_reports_of_all_ranks(found, engine):
    (first, second), _ = found[engine]
    first, second = first["reports"], second["reports"]
    _, _, one = runs.reports("")
    assert first["mine"]["modules"] != second["mine"]["modules"]
    assert one["unlike"] is None
    for ours in (first, second):
        same(ours["together"], one["together"])
        same(ours["process group"], one["together"])
        same(ours["groups"]["all"], one["groups"]["all"])
        assert sorted(ours["groups"]) == ["all", "rank 0", "rank 1"]
        samples = {m["samples"] for m in ours["groups"]["rank 1"]["modules"].values()}
        assert samples == {1}
        assert ours["unlike"].startswith("the ranks recorded with positions=True on some of them")
        assert ours["refused"] == one["refused"]
        assert ours["refused"].startswith("reduce='sum' was asked: pass True")
    # The rank that ran nothing gets the report of the one that ran it all.
    if engine == "ddp":
        assert (first["nothing"], second["nothing"][:20]) == (None, "nothing was recorded")
        same(second["one ran"], without_details(one["together"]))
    else:
        assert second["one ran"].startswith("nothing was recorded")


@pytest.mark.parametrize("engine", ENGINES)
def test_histories_of_all_ranks(found, engine):
    """The sparsity of all of them, and of the taus those that a rank has itself."""
    first, second = (each["reports"]["history"] for each in found[engine][0])
    one = runs.reports("")[2]["history"]
    assert 0 < one["sparsities"]["blocks.0.q_proj"][0] < 1
    assert None not in one["taus"]["blocks.0.q_proj"]
    assert first == one
    assert {**second, "taus": one["taus"]} == one
    missing = {name: [None] for name in one["taus"]}
    assert second["taus"] == (one["taus"] if engine == "ddp" else missing)


def without_details(report):
    """As recorded without positions and ratios."""
    details = ("ratios", "by_sample", "by_position")
    modules = {
        name: {k: v for k, v in module.items() if k not in details}
        for name, module in report["modules"].items()
    }
    assert modules != report["modules"]
    return {**report, "modules": modules}


def same(ours, one):
    """Exactly: shares add up in any order."""
    assert ours == one
    assert 0 < one["sparsity"] < 1


def test_one_rank_alone_waits_for_nobody(found):
    seen = {engine: found[engine][0][1]["reports"] for engine in ENGINES}
    assert {engine: seen[engine]["sharded"] for engine in ENGINES} == {"ddp": False, "fsdp2": True}
    assert seen["ddp"]["gate"] == "TokenGate(tau=0.2, penalty=0.0001)"
    assert seen["fsdp2"]["gate"] == "TokenGate(penalty=0.0001)"
    taus = {e: seen[e]["alone"]["modules"]["blocks.0.q_proj"]["tau"] for e in ENGINES}
    assert taus == {"ddp": pytest.approx(0.2), "fsdp2": None}
    assert seen["fsdp2"]["together"]["modules"]["blocks.0.q_proj"]["tau"] == pytest.approx(0.2)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_wrapped_model_is_disabled_but_not_unpatched(found, engine):
    by = {"ddp": "DistributedDataParallel", "fsdp2": "fully_shard"}[engine]
    (ours, _), _ = found[engine]
    ours = ours["reports"]
    assert ours["unpatch"].startswith(f"'the model' is wrapped by {by}, which")
    if engine == "fsdp2":
        assert ours["a part"].startswith("'the layer' is wrapped by fully_shard, which")
    assert ours["still"] == 6
    model = runs.patched()
    with torch.no_grad():
        assert distance(ours["disabled"], model(runs.batch(0)).tolist()) > 0.01
        base = tokengate.unpatch(model)(runs.batch(0)).tolist()
    assert distance(ours["disabled"], base) < 1e-6


@pytest.mark.parametrize("engine", ENGINES)
def test_one_ordinary_adapter(found, engine):
    (first, second), folder = found[engine]
    assert len(second["saved"]["outputs"]) == 8
    model = tokengate.unpatch(runs.patched("dora", train=["head"]))
    with torch.no_grad():
        assert distance(model(runs.batch(0)).tolist(), first["saved"]["outputs"]) > 0.01
        tokengate.load(model, folder / "adapter")
        got = model(runs.batch(0)).tolist()
    assert distance(got, first["saved"]["outputs"]) < 1e-6
    # And into a model that is sharded.
    for rank in (first, second):
        assert distance(rank["saved"]["before"], got) > 0.01
        assert distance(rank["saved"]["loaded"], got) < 1e-6


def test_a_sharded_model_is_exported_for_peft(processes, tmp_path):
    peft = pytest.importorskip("peft", reason="the test extra is not installed")
    two_ranks.wait_for(two_ranks.start(processes, runs.exported, tmp_path))
    first, second = both(tmp_path)
    assert first.keys() == second.keys()
    assert not (tmp_path / "refused").exists()
    x = runs.batch(1)
    for method in ("lora", "dora", "adalora"):
        for rank in (first, second):
            assert "tau above 0 in 6 of 6 layers" in rank[f"refused {method}"]
        expected = torch.tensor(first[method])
        assert distance(expected, second[method]) < 1e-6
        base = tokengate.unpatch(runs.patched(method))
        assert distance(base(x), expected) > 0.01
        theirs = peft.PeftModel.from_pretrained(base, tmp_path / method).eval()
        assert distance(theirs(x), expected) < 1e-5


def test_what_fsdp1_divided_is_not_taken_for_values(processes, tmp_path):
    two_ranks.wait_for(two_ranks.start(processes, runs.flattened, tmp_path))
    model = runs.patched("adalora", train=["head"])
    names, P = list(tokengate.layers(model)), model.blocks[0].q_proj.modification.P.detach().clone()
    for rank, found in enumerate(both(tmp_path)):
        for original, seen in found.items():
            assert seen["names"] == names
            for what in ("save", "inside", "export", "load", "calibrate", "orthogonality"):
                assert "in pieces, into which FSDP divided it" in seen[what], (what, seen[what])
            assert "summon_full_params" in seen["save"]
            assert "in pieces" in seen["a layer"]
            assert "is wrapped by FSDP" in seen["unpatch"]
            assert not seen["written"]
            assert distance(seen["changed"], P) == 1
            assert distance(seen["P"], P) == 0
            base = tokengate.unpatch(runs.patched("adalora"))
            tokengate.load(base, tmp_path / f"{original}-{rank}", strict=original)
            assert distance(base(runs.batch(1)), model(runs.batch(1))) == 0


def test_accelerate(processes, tmp_path):
    pytest.importorskip("accelerate", reason="the transformers extra is not installed")
    pytest.importorskip("transformers", reason="the transformers extra is not installed")
    two_ranks.wait_for(two_ranks.start(processes, runs.with_accelerate, tmp_path))
    first, second = both(tmp_path)
    one = runs.training("lora", "", clip=runs.CLIP)["taus"]
    assert distance(one, runs.training("lora", "")["taus"]) > 1e-5, "it is clipped"
    assert (first["ddp is"], first["fsdp2 is"]) == ("DistributedDataParallel", "FSDPNet")
    for engine in ENGINES:
        assert first[engine] == second[engine]
        assert distance(first[engine], one) < 1e-6


def test_zero(processes, tmp_path):
    pytest.importorskip("deepspeed", reason="DeepSpeed is not installed")
    two_ranks.wait_for(two_ranks.start(processes, runs.with_zero, tmp_path))
    first, second = both(tmp_path)
    assert first == second
    assert first.pop("RankAllocator").startswith("no gradient was seen at step 1")
    assert first.pop("SparsitySchedule").startswith("no gradient of tau was seen in any of the 6")
    assert set(first) == {(stage, method) for stage in runs.ZERO for method in runs.ZERO[stage]}
    ones = {method: runs.training(method, "", budget=False)["taus"] for method in runs.METHODS}
    for (_, method), taus in first.items():
        expected = ones[method][runs.ZERO_STEPS - 1]
        assert distance(expected, ones[method][0]) > 0.01
        assert distance(taus, expected) < 1e-6


@pytest.mark.parametrize("engine", ENGINES)
def test_an_overflow_on_one_rank_is_skipped_on_both(processes, tmp_path, engine):
    two_ranks.wait_for(two_ranks.start(processes, runs.an_overflow_on_one_rank, tmp_path, engine))
    first, second = both(tmp_path)
    assert torch.equal(first["taus"], second["taus"])
    moves = first["taus"].diff(dim=0) != 0
    assert moves[[0, 2]].all()
    assert not moves[1].any()
    assert [first["skipped"], second["skipped"]] == [6, 6]
