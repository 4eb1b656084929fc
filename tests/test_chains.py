"""Chains: who learned from whom, read out of the stages of a result."""

from hypothesis import given
from hypothesis import strategies as st
from results import distilled, member, on_labels, result, stage

from kdcore.chains import chains, chosen, groups, label, stop, whole


def two_assistants(seed=0, control=""):
    """10-2 and 10-8-2, whose names end in the seed."""
    more = {"seed": seed, "control": control}
    teacher = on_labels(f"10.{seed}", "mlp-10", seed=seed)
    eight = distilled(f"10-8.{seed}{control}", "mlp-8", teacher, **more)
    direct = distilled(f"10-2.{seed}{control}", "mlp-2", teacher, **more)
    return [teacher, eight, direct, distilled(f"10-8-2.{seed}{control}", "mlp-2", eight, **more)]


def test_a_chain_leads_from_the_first_teacher_to_the_learner():
    found = chains(two_assistants())
    assert [chain.label for chain in found] == ["10-8", "10-2", "10-8-2"]
    assert [link.stage for link in found[2].links] == ["10.0", "10-8.0", "10-8-2.0"]
    assert [link.member for link in found[2].links] == ["teacher", "student", "student"]
    assert found[2].distilled == ("10-8.0", "10-8-2.0")


def test_learners_without_a_teacher_have_no_chain():
    peers = stage("peers", {"a": member("mlp-2"), "b": member("mlp-4")}, {"a": 10, "b": 10})
    tuned = stage("tuned", {"student": member("mlp-2")}, {"student": 10}, inputs={"student": {"stage": "x"}})
    assert chains([on_labels("label", "mlp-2"), peers, tuned]) == []


def test_a_control_beside_the_student_is_no_learner():
    teacher = on_labels("t", "mlp-10")
    (chain,) = chains([teacher, distilled("s", "mlp-2", teacher, control="beside")])
    assert chain.end.member == "student"
    assert chain.controllers == ("dskd",)


def test_a_teacher_under_any_name_teaches_and_the_one_called_teacher_comes_first():
    one, two = on_labels("one", "mlp-10"), on_labels("two", "mlp-8")
    refs = {"critic": {"stage": "one", "member": "teacher"}, "teacher": {"stage": "two", "member": "teacher"}}
    members = {"critic": member("mlp-10", False), "teacher": member("mlp-8", False), "pupil": member("mlp-2")}
    pupil = stage("p", members, {"critic": 10, "teacher": 10, "pupil": 10}, inputs=refs)
    assert [chain.label for chain in chains([one, two, pupil])] == ["8-2"]


def test_whole_chains_teach_nobody_and_the_chosen_one_ends_in_the_delivered_student():
    stages = two_assistants()
    dead_end = distilled("10-4", "mlp-4", stages[0])
    found = result([*stages[:2], dead_end, *stages[2:]])
    assert [chain.label for chain in whole(found)] == ["10-4", "10-2", "10-8-2"]
    assert chosen(found, chains(found["stages"])).label == "10-8-2"
    assert chosen(found, []) is None


def test_groups_hold_one_chain_a_seed_and_keep_controllers_apart():
    stages = [s for seed in (1, 0) for control in ("", "beside") for s in two_assistants(seed, control)]
    found = groups(chains(stages))
    assert [(g.label, g.controllers, [c.seed for c in g.chains]) for g in found] == [
        (name, with_them, [0, 1]) for with_them in ((), ("dskd",)) for name in ("10-8", "10-2", "10-8-2")
    ]


def test_two_chains_of_the_same_models_and_seed_are_two_groups():
    teacher = on_labels("t", "mlp-10")
    stages = [teacher, distilled("a", "mlp-2", teacher), distilled("b", "mlp-2", teacher)]
    assert [g.label for g in groups(chains(stages))] == ["10-2", "10-2 (2)"]


def test_labels_are_sizes_within_a_family_and_names_else():
    assert label(["mlp-10", "mlp-8", "mlp-2"]) == "10-8-2"
    assert label(["cnn-3", "mlp-4", "mlp-2"]) == "cnn-3 > mlp-4 > mlp-2"
    assert label(["tiny", "mlp-4"]) == "tiny > mlp-4"
    assert label(["my-net-4", "my-net-2"]) == "4-2"


def test_a_dropped_control_stops_nothing_and_a_dropped_teacher_does():
    teacher = on_labels("t", "mlp-10")
    own = distilled("s", "mlp-2", teacher, stopped=400, control="beside")
    assert stop(own)["target"] == "student.kd.weight"
    own["events"][0].update(kind="drop", target="control", value=None)
    assert stop(own) is None
    own["events"][0].update(target="teacher")
    assert stop(own)["kind"] == "drop"


@given(st.lists(st.integers(0, 20), max_size=12))
def test_every_learner_has_one_chain_that_extends_its_teachers(parents):
    """A tree: each stage is distilled from the one before it that is named, stage 0 from labels."""
    stages = [on_labels("0", "mlp-10")]
    for i, parent in enumerate(parents, 1):
        stages.append(distilled(str(i), "mlp-4", stages[parent % i]))
    found = {chain.end.stage: chain for chain in chains(stages)}
    assert sorted(found, key=int) == [str(i) for i in range(1, len(stages))]
    for i, parent in enumerate(parents, 1):
        above = found[str(parent % i)].links if parent % i else found[str(i)].links[:1]
        assert found[str(i)].links[:-1] == above
    assert sum(len(group.chains) for group in groups(found.values())) == len(parents)
