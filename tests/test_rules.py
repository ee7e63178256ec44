"""The table of update rules: shapes, domains, messages of every error, and which rule is which at the ends."""

import math
import pickle

import numpy as np
import pytest

from gut_fast.rules import RULES, Coefficients, Interval, UpdateRule, get_rule, update_rule

TABLE = {
    "dsgd": ((), {}, 1),
    "gut": (("r",), {"mu": 0.9, "kappa": 1.0}, 1),
    "gutm": (("m", "r"), {"momentum": 0.9, "mu": 0.8}, 1),
    "qgt": (("m",), {"momentum": 0.9, "mu": 1.0}, 1),
    "d2": (("r",), {"kappa": 1.0}, 1),
    "edm": (("m", "r"), {"momentum": 0.9}, 1),
    "extra": (("r",), {}, 1),
    "awc_gut": (("r",), {"mu": 0.9}, 1),
    "decentlam": (("m",), {"momentum": 0.9}, 1),
    "gasloc": (("e",), {"momentum": 0.9}, 1),
    "k_gt": (("c", "a"), {}, 2),
    "qg_gutm": (("p", "c"), {"momentum": 0.9, "mu": 0.06}, 1),
    "dsgdm": (("m",), {"momentum": 0.9, "nesterov": False}, 1),
    "qg_dsgdm": (("m",), {"momentum": 0.9, "nesterov": False}, 1),
    "gradient_tracking": (("v", "q"), {}, 2),
    "momentum_tracking": (("v", "m"), {"momentum": 0.9}, 2),
}


def leaky(lr, leak=0.5):
    """S = z − ηg;  z' = S + D;  a' = leak·a + g

    A rule of a user's own.
    """
    return Coefficients(A=[[1, 0, -lr]], B=[[0, 0, 0], [0, leak, 1]], C=[[1], [0]], E=[[1], [0]])


LEAKY = UpdateRule("leaky", ("a",), leaky)


def test_the_table_holds_exactly_these_rules():
    assert {name: (rule.states, rule.hyperparameters, rule.num_messages) for name, rule in RULES.items()} == TABLE


@pytest.mark.parametrize("name", RULES)
def test_coefficients_have_one_column_per_input_and_one_row_per_output(name):
    rule = RULES[name]
    num_inputs = len(rule.states) + 2
    assert rule.inputs == ("z", *rule.states, "g")
    assert rule.outputs == ("z'", *(f"{state}'" for state in rule.states))
    for lr in (0.0, 1e-4, 0.1, 10.0):
        coefficients = rule.coefficients(lr)
        assert [len(row) for row in coefficients.A] == [num_inputs] * rule.num_messages
        assert [len(row) for row in coefficients.B] == [num_inputs] * (num_inputs - 1)
        assert [len(row) for row in coefficients.C] == [rule.num_messages] * (num_inputs - 1)
        assert [len(row) for row in coefficients.E] == [rule.num_messages] * (num_inputs - 1)
        assert all(math.isfinite(value) for value in coefficients.flat())


@pytest.mark.parametrize("name", RULES)
def test_every_rule_says_its_equation_and_its_source(name):
    rule = RULES[name]
    assert all(output in rule.equation for output in rule.outputs)
    assert len(rule.source) > 20
    assert rule.equation not in rule.source


def test_flat_is_a_b_c_e_row_by_row():
    coefficients = Coefficients(A=[[1, 2, 3]], B=[[4, 5, 6], [7, 8, 9]], C=[[10], [11]], E=[[12], [13]])
    assert coefficients.flat() == [float(value) for value in range(1, 14)]


def test_a_name_may_be_spelt_as_papers_and_command_lines_do():
    for name in ("qg_gutm", "qg-gutm", "QG-GUTm"):
        assert get_rule(name) is RULES["qg_gutm"]
    assert get_rule("GUT") is RULES["gut"]
    with pytest.raises(ValueError, match=r"unknown rule 'Gutt'; known are .*; did you mean 'gut'\?"):
        get_rule("Gutt")


def test_get_rule_by_name_or_itself():
    assert get_rule("gut") is RULES["gut"]
    assert get_rule(LEAKY) is LEAKY
    with pytest.raises(ValueError, match="unknown rule 'gott'; known are dsgd, gut"):
        get_rule("gott")
    with pytest.raises(TypeError, match="a rule is a name or an UpdateRule, got int"):
        get_rule(3)


# Hyper-parameters


def test_check_fills_in_the_defaults():
    assert RULES["qg_gutm"].check({"mu": 0.5}) == {"momentum": 0.9, "mu": 0.5}


@pytest.mark.parametrize(
    ("name", "hyperparameters", "error", "message"),
    [
        ("dsgd", {"mu": 0.1}, ValueError, "'dsgd' has no hyper-parameter 'mu'; it has: none"),
        ("gut", {"momentum": 0.9}, ValueError, "'gut' has no hyper-parameter 'momentum'; it has: mu"),
        ("gut", {"mu": -0.1}, ValueError, r"mu=-0.1 is outside \[0, 1\]"),
        ("gut", {"mu": 1.0000001}, ValueError, r"mu=1.0000001 is outside \[0, 1\]"),
        ("gut", {"mu": math.nan}, ValueError, "mu=nan is outside"),
        ("gut", {"mu": "much"}, TypeError, "mu must be a number, got str 'much'"),
        ("gut", {"mu": True}, TypeError, "mu must be a number, got bool True"),
        ("dsgdm", {"momentum": 1.0}, ValueError, r"momentum=1.0 is outside \[0, 1\)"),
        ("dsgdm", {"momentum": -0.5}, ValueError, "momentum=-0.5 is outside"),
        ("dsgdm", {"nesterov": 1}, TypeError, "nesterov must be True or False, got 1"),
    ],
)
def test_bad_hyperparameters_are_named(name, hyperparameters, error, message):
    with pytest.raises(error, match=message):
        RULES[name].check(hyperparameters)
    with pytest.raises(error, match=message):
        RULES[name].coefficients(0.1, **hyperparameters)


def test_the_ends_of_the_domain_belong_to_it():
    assert all(RULES["gut"].check({"mu": mu}) == {"mu": mu, "kappa": 1.0} for mu in (0, 0.0, 1, 1.0))


@pytest.mark.parametrize(
    ("lr", "error", "message"),
    [
        (math.nan, ValueError, r"lr=nan is outside \[0, inf\)"),
        (math.inf, ValueError, r"lr=inf is outside \[0, inf\)"),
        (-0.1, ValueError, r"lr=-0.1 is outside \[0, inf\)"),
        ("fast", TypeError, "lr must be a number, got str 'fast'"),
        (True, TypeError, "lr must be a number, got bool True"),
    ],
)
def test_bad_learning_rates_are_named(lr, error, message):
    for name, rule in RULES.items():
        with pytest.raises(error, match=f"rule '{name}': {message}"):
            rule.coefficients(lr)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"weight_decay": math.nan}, ValueError, r"weight_decay=nan is outside \[0, inf\)"),
        ({"weight_decay": -1}, ValueError, r"weight_decay=-1 is outside \[0, inf\)"),
        ({"weight_decay": "some"}, TypeError, "weight_decay must be a number, got str 'some'"),
        ({"maximize": 1}, TypeError, "maximize must be True or False, got 1"),
    ],
)
def test_bad_options_are_named(options, error, message):
    for lr in (0.0, 0.1):
        with pytest.raises(error, match=message):
            RULES["gut"].coefficients(lr, **options)


def test_numpy_numbers_are_numbers():
    assert RULES["gut"].coefficients(np.float32(0.5), mu=np.float64(0.25)) == RULES["gut"].coefficients(0.5, mu=0.25)


@pytest.mark.parametrize("name", RULES)
def test_zero_learning_rate_is_plain_gossip(name):
    rule = RULES[name]
    coefficients = rule.coefficients(0.0, weight_decay=0.1, maximize=True)
    num_inputs, num_messages = len(rule.inputs), rule.num_messages
    first_column = [[1.0] + [0.0] * (num_messages - 1)] + [[0.0] * num_messages] * len(rule.states)
    assert list(coefficients.A[0]) == [1.0] + [0.0] * (num_inputs - 1)
    assert coefficients.C == coefficients.E == first_column
    for row, values in enumerate(coefficients.B):
        assert list(values) == [float(row == column and row > 0) for column in range(num_inputs)]


@pytest.mark.parametrize(("weight_decay", "maximize"), [(0.1, False), (0.0, True), (0.1, True)])
def test_weight_decay_and_maximize_change_the_columns_of_z_and_g_alone(weight_decay, maximize):
    for rule in RULES.values():
        plain, folded = rule.coefficients(0.5), rule.coefficients(0.5, weight_decay=weight_decay, maximize=maximize)
        assert (folded.C, folded.E) == (plain.C, plain.E)
        for row, plain_row in zip([*folded.A, *folded.B], [*plain.A, *plain.B], strict=True):
            assert row[0] == plain_row[0] + weight_decay * plain_row[-1]
            assert row[1:-1] == plain_row[1:-1]
            assert row[-1] == (-plain_row[-1] if maximize else plain_row[-1])


# Which rule is which at the ends


def test_d2_is_gut_at_mu_1():
    assert RULES["gut"].coefficients(0.3, mu=1.0) == RULES["d2"].coefficients(0.3)


def test_gut_at_mu_0_is_dsgd_beside_an_unused_r():
    gut, dsgd = RULES["gut"].coefficients(0.3, mu=0.0), RULES["dsgd"].coefficients(0.3)
    assert [[row[0], row[2]] for row in gut.A] == dsgd.A
    assert [row[1] for row in (*gut.A, *gut.B)] == [0.0, 0.0, 0.0]
    assert (gut.B[0], gut.C[0], gut.E[0]) == ([0, 0, 0], dsgd.C[0], dsgd.E[0])


@pytest.mark.parametrize("momentum", [0.5, 0.9])
def test_qgt_is_qg_dsgdm_where_its_drift_has_no_weight_of_its_own(momentum):
    qgt = RULES["qgt"].coefficients(0.3, momentum=momentum, mu=1 - momentum)
    assert qgt == RULES["qg_dsgdm"].coefficients(0.3, momentum=momentum)


def test_gutm_without_tracking_is_qg_dsgdm_beside_an_unused_r():
    gutm, qg_dsgdm = RULES["gutm"].coefficients(0.3, mu=0.0), RULES["qg_dsgdm"].coefficients(0.3)
    assert [[*row[:2], row[3]] for row in gutm.A] == qg_dsgdm.A
    assert [[*row[:2], row[3]] for row in gutm.B[:2]] == qg_dsgdm.B
    assert (gutm.C[:2], gutm.E[:2]) == (qg_dsgdm.C, qg_dsgdm.E)
    assert [row[2] for row in (*gutm.A, *gutm.B)] == [0.0] * 4


@pytest.mark.parametrize("nesterov", [False, True])
def test_dsgdm_without_momentum_is_dsgd(nesterov):
    dsgdm, dsgd = RULES["dsgdm"].coefficients(0.3, momentum=0.0, nesterov=nesterov), RULES["dsgd"].coefficients(0.3)
    assert [[row[0], row[2]] for row in dsgdm.A] == dsgd.A
    assert (dsgdm.B[0], dsgdm.C[0], dsgdm.E[0]) == ([0, 0, 0], dsgd.C[0], dsgd.E[0])


# Rules of a user's own


def test_a_rule_of_ones_own():
    assert (LEAKY.inputs, LEAKY.outputs, LEAKY.num_messages) == (("z", "a", "g"), ("z'", "a'"), 1)
    assert LEAKY.hyperparameters == {"leak": 0.5}
    assert LEAKY.equation == "S = z − ηg;  z' = S + D;  a' = leak·a + g"
    assert LEAKY.source == "A rule of a user's own."
    assert LEAKY.coefficients(0.1, leak=-7).B[1] == [0, -7, 1]


def test_a_rule_of_ones_own_may_set_domains():
    rule = UpdateRule("leaky", ("a",), leaky, {"leak": Interval(0.0, 2.0, open_above=True)})
    assert rule.check({"leak": 0}) == {"leak": 0}
    with pytest.raises(ValueError, match=r"leak=2 is outside \[0, 2\)"):
        rule.check({"leak": 2})


def made_of(**changed):
    """A formula with one state that returns the coefficients of `leaky`, some of them replaced."""
    matrices = vars(leaky(1.0)) | changed
    return lambda lr: Coefficients(**matrices)


@pytest.mark.parametrize(
    ("states", "formula", "error", "message"),
    [
        (
            ("a",),
            made_of(A=[[1, 0]]),
            ValueError,
            r"row S1 of A has 2 entries, expected shape \(1, 3\).*columns z, a",
        ),
        (("a",), made_of(B=[[0, 0, 0]]), ValueError, r"B has 1 rows, expected shape \(2, 3\): rows z', a'"),
        (("a",), made_of(B=[[0, 0, 0], [0] * 4]), ValueError, "row a' of B has 4 entries"),
        (("a",), made_of(C=[[1]]), ValueError, r"C has 1 rows, expected shape \(2, 1\)"),
        (("a",), made_of(C=[[1, 1], [0, 0]]), ValueError, "row z' of C has 2 entries"),
        (("a",), made_of(E=[[1], []]), ValueError, "row a' of E has 0 entries"),
        (("a",), made_of(A=[]), ValueError, "A has no row; a rule sends at least one message"),
        (("a",), made_of(A=[[1, math.inf, 0]]), ValueError, r"A\[S1, a\] = inf is not a finite number"),
        (("a",), made_of(B=[[0, 0, math.nan], [0, 0, 0]]), ValueError, r"B\[z', g\] = nan is not a finite number"),
        (("a",), made_of(E=[[1], [-math.inf]]), ValueError, r"E\[a', D1\] = -inf is not a finite number"),
        (("a", "b"), made_of(), ValueError, "row S1 of A has 3 entries, expected shape"),
        (("a", "a"), made_of(), ValueError, r"states must be distinct names other than 'z' and 'g', got \('a', 'a'\)"),
        (("z",), made_of(), ValueError, "states must be distinct names"),
        (("g",), made_of(), ValueError, "states must be distinct names"),
        (("",), made_of(), ValueError, "states must be distinct names"),
        ((3,), made_of(), ValueError, "states must be distinct names"),
        (("a",), lambda lr: None, TypeError, "must return Coefficients, got NoneType"),
        (("a",), lambda: None, TypeError, r"first argument must be 'lr', got \[\]"),
        (("a",), lambda mu=0.1: None, TypeError, r"first argument must be 'lr', got \['mu'\]"),
        (("a",), lambda lr, mu: None, TypeError, "hyper-parameter 'mu' needs a default"),
    ],
)
def test_a_bad_rule_is_refused_and_the_message_names_the_entry(states, formula, error, message):
    with pytest.raises(error, match=f"rule 'mine': .*{message}"):
        UpdateRule("mine", states, formula)


def test_coefficients_that_turn_bad_later_are_refused_when_they_do():
    def formula(lr, power=1.0):
        return Coefficients(A=[[1, -(lr**power)]], B=[[0, 0]], C=[[1]], E=[[1 / power if power else math.nan]])

    rule = UpdateRule("mine", (), formula)
    with pytest.raises(ValueError, match=r"rule 'mine': E\[z', D1\] = nan is not a finite number"):
        rule.coefficients(0.1, power=0.0)


@pytest.mark.parametrize("name", RULES)
def test_rules_of_the_table_pickle_by_name(name):
    assert pickle.loads(pickle.dumps(RULES[name])) is RULES[name]


def test_a_rule_of_ones_own_pickles():
    copy = pickle.loads(pickle.dumps(LEAKY))
    assert copy == LEAKY
    assert copy.coefficients(0.1, leak=0.3) == LEAKY.coefficients(0.1, leak=0.3)


def test_update_rule_registers_and_refuses_a_name_that_is_taken(monkeypatch):
    monkeypatch.setattr("gut_fast.rule.RULES", dict(RULES))
    rule = update_rule("a")(leaky)
    assert get_rule("leaky") is rule
    assert rule == LEAKY

    def gut(lr):
        return made_of()(lr)

    with pytest.raises(ValueError, match="there is a rule 'gut' already; choose another name"):
        update_rule("a")(gut)
    assert get_rule("gut") is RULES["gut"]


def test_running_the_same_definition_again_replaces_the_rule(monkeypatch):
    monkeypatch.setattr("gut_fast.rule.RULES", dict(RULES))
    update_rule("a")(leaky)
    second = update_rule("a")(leaky)
    assert get_rule("leaky") is second


def test_options_of_every_rule_are_no_hyperparameters():
    with pytest.raises(ValueError, match="'weight_decay' is an option of every rule"):
        UpdateRule("own", (), lambda lr, weight_decay=0.0: Coefficients([[1, -lr]], [[0, 0]], [[1]], [[1]]))


@pytest.mark.parametrize("A", [[1.0, -0.1], 1.0, None])
def test_matrices_are_lists_of_rows(A):
    with pytest.raises(TypeError, match="rule 'own': A must be a list of rows"):
        UpdateRule("own", (), lambda lr: Coefficients(A, [[0, 0]], [[1]], [[1]]))


def test_the_number_of_messages_is_that_of_the_defaults():
    def formula(lr, twice=False):
        rows = 2 if twice else 1
        return Coefficients([[1, -lr]] * rows, [[0, 0]], [[1] * rows], [[1] * rows])

    with pytest.raises(ValueError, match="A has 2 rows, but 1 at the defaults"):
        UpdateRule("own", (), formula).coefficients(0.1, twice=True)
