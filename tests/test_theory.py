"""The papers' mathematics as executable checks, on cases small enough to enumerate: RA3 (v1 and v2) and RMT.

A claim that holds is asserted as printed. Where the printed form is off, the correct form is asserted, and so is the
deviation of the printed one. docs/theory.md has the findings.

Notation: a action, z latent, q the sampler of latents, p their prior, pi the policy, D the demonstrations,
J(pi, q) the temporal ELBO, J_NTP the log-likelihood, gamma-bar = sup E[gamma^tau] the discount of an option.
"""

import itertools
import math

import numpy as np
import pytest
import torch

from rmt import curriculum_probs, group_advantages, length_reward, token_budget

# ---------------------------------------------------------------- RA3, section 4: a latent sequence model, enumerated
#
# The language setting: the state s_t is the context a_<t. A table that depends on some of a_0.., z_0.. has
# those axes and size 1 on the others, so the joint distribution is a broadcast sum of log tables. Axes: STEPS
# actions first, then STEPS latents.

STEPS, ACTIONS, LATENTS = 3, 2, 3
ALL_AXES = tuple(range(2 * STEPS))


def a_axis(t):
    return t


def z_axis(t):
    return STEPS + t


def log_sum_exp(x, axis):
    top = x.max(axis=axis, keepdims=True)
    return top + np.log(np.exp(x - top).sum(axis=axis, keepdims=True))


def log_normalise(x, axis):
    return x - log_sum_exp(x, axis)


def random_log_table(rng, axes, over, scale=1.5):
    """A random log-distribution over axis `over` that depends on `axes`."""
    shape = [1] * (2 * STEPS)
    for axis in axes:
        shape[axis] = ACTIONS if axis < STEPS else LATENTS
    return log_normalise(scale * rng.standard_normal(shape), over)


def random_policy(rng, reads_state=True):
    """log pi(a_t | s_t, z_t), one table per step; reads_state=False is a poor policy, pi(a_t | z_t)."""
    states = [range(t if reads_state else 0) for t in range(STEPS)]
    return [random_log_table(rng, [*states[t], a_axis(t), z_axis(t)], a_axis(t)) for t in range(STEPS)]


def random_prior(rng, memory=STEPS):
    """log p(z_t | s_t, the last `memory` latents): 0 independent, 1 Markov, STEPS all of z_{0:t-1}."""
    past = [range(max(0, t - memory), t + 1) for t in range(STEPS)]
    return [random_log_table(rng, [*range(t), *map(z_axis, past[t])], z_axis(t)) for t in range(STEPS)]


def seen_actions(t, sight):
    """How many actions q may look at when it draws z_t: 'past' is the paper's q(z_t | s_t, z_{0:t-1})."""
    return t if sight == "past" else STEPS


def random_q(rng, sight):
    axes = [[*range(seen_actions(t, sight)), *map(z_axis, range(t + 1))] for t in range(STEPS)]
    return [random_log_table(rng, axes[t], z_axis(t)) for t in range(STEPS)]


def random_demos(rng):
    """D_E: a distribution with full support over action sequences, [A, A, A, 1, 1, 1]."""
    return rng.dirichlet(np.ones(ACTIONS**STEPS)).reshape([ACTIONS] * STEPS + [1] * STEPS)


def log_likelihood_per_sequence(log_pi, log_prior):
    return log_sum_exp(sum(log_pi) + sum(log_prior), tuple(range(STEPS, 2 * STEPS)))


def log_likelihood(demos, log_pi, log_prior):
    """J_NTP of the latent-variable model, by summing over every z_{0:T}."""
    return float((demos * log_likelihood_per_sequence(log_pi, log_prior)).sum())


def elbo(demos, log_pi, log_prior, log_q):
    """J(pi, q) of Theorem 4.1, term by term as printed: sum_t log pi - KL(q_t || p_t) under z ~ q."""
    value, reach = 0.0, demos  # reach: probability of the demonstration and of z_{0:t-1}
    for t in range(STEPS):
        q = np.exp(log_q[t])
        kl = (q * (log_q[t] - log_prior[t])).sum(axis=z_axis(t), keepdims=True)
        value -= (reach * kl).sum()
        reach = reach * q
        value += (reach * log_pi[t]).sum()
    return float(value)


def e_step(demos, log_pi, log_prior, sight, look_ahead=STEPS):
    """The exact argmax over autoregressive q of eq. (4.1), by a soft Bellman recursion backwards in time.

    V_t is the log of the normaliser of q_t; look_ahead=1 forgets V_{t+1}, a return of one step.
    """
    log_q, value = [None] * STEPS, 0.0
    for t in reversed(range(STEPS)):
        gain = log_pi[t] + (value if look_ahead > 1 else 0.0)
        hidden = tuple(range(seen_actions(t, sight), STEPS))
        if hidden:
            weights = demos / demos.sum(axis=hidden, keepdims=True)  # D(a_{t:T} | s_t)
            gain = (weights * gain).sum(axis=hidden, keepdims=True)
        log_q[t] = log_normalise(log_prior[t] + gain, z_axis(t))
        value = log_sum_exp(log_prior[t] + gain, z_axis(t))
    return log_q


def m_step(demos, log_tables, log_q, over):
    """argmax E_{D, q}[log table_t], which is counting: eq. (4.2) when the tables are pi (over = a_axis)."""
    weights = demos * np.exp(sum(log_q))
    fitted = []
    for t, table in enumerate(log_tables):
        unused = tuple(axis for axis in ALL_AXES if table.shape[axis] == 1)
        fitted.append(log_normalise(np.log(weights.sum(axis=unused, keepdims=True)), over(t)))
    return fitted


def test_temporal_elbo_is_a_bound_and_tight_at_the_posterior():
    """Theorem 4.1: J_NTP >= J for every q; the gap is E_D KL(q || posterior), and only a q that sees a_{0:T} closes it.

    A.4's second line has p(a_t | s_t, z_t) where p(z_t | s_t, z_{0:t-1}) belongs, and can exceed J_NTP.
    """
    excess = []
    for seed in range(20):
        rng = np.random.default_rng(seed)
        demos, log_pi, log_prior = random_demos(rng), random_policy(rng), random_prior(rng)
        target = log_likelihood(demos, log_pi, log_prior)
        joint = sum(log_pi) + sum(log_prior)
        log_posterior = joint - log_likelihood_per_sequence(log_pi, log_prior)
        for sight in ("past", "all"):
            for _ in range(5):
                log_q = random_q(rng, sight)
                q, log_q_z = np.exp(sum(log_q)), sum(log_q)
                assert elbo(demos, log_pi, log_prior, log_q) <= target
                gap = (demos * q * (log_q_z - log_posterior)).sum()
                assert elbo(demos, log_pi, log_prior, log_q) == pytest.approx(target - gap, abs=1e-12)
        best_all = e_step(demos, log_pi, log_prior, "all")
        np.testing.assert_allclose(sum(best_all), log_posterior, atol=1e-12)
        assert elbo(demos, log_pi, log_prior, best_all) == pytest.approx(target, abs=1e-12)
        best_past = e_step(demos, log_pi, log_prior, "past")
        assert elbo(demos, log_pi, log_prior, best_past) < target - 1e-2
        printed = (demos * np.exp(sum(best_all)) * (2 * sum(log_pi) - sum(best_all))).sum()  # A.4, line 2
        surplus = (demos * np.exp(sum(best_all)) * (sum(log_pi) - sum(log_prior))).sum()
        assert printed == pytest.approx(elbo(demos, log_pi, log_prior, best_all) + surplus, abs=1e-12)
        excess.append(printed - target)
    assert max(excess) > 0.5


@pytest.mark.parametrize("sight", ["past", "all"])
def test_e_step_is_the_argmax_over_autoregressive_q(sight):
    """Eq. (4.1): the E-step is RL over T steps with the return to the end; a shorter one suits only a prior without memory."""
    for seed in range(10):
        rng = np.random.default_rng(100 + seed)
        demos, log_pi, log_prior = random_demos(rng), random_policy(rng), random_prior(rng)
        log_q = e_step(demos, log_pi, log_prior, sight)
        best = elbo(demos, log_pi, log_prior, log_q)
        for step_size in (1e-3, 1e-1, 1.0, 10.0):  # near and far rivals
            rival = [log_normalise(mine + step_size * other, z_axis(t))
                     for t, (mine, other) in enumerate(zip(log_q, random_q(rng, sight)))]
            assert elbo(demos, log_pi, log_prior, rival) < best
        myopic = e_step(demos, log_pi, log_prior, sight, look_ahead=1)
        assert elbo(demos, log_pi, log_prior, myopic) < best - 1e-3
        no_memory = random_prior(rng, memory=0)
        myopic = e_step(demos, log_pi, no_memory, sight, look_ahead=1)
        best = elbo(demos, log_pi, no_memory, e_step(demos, log_pi, no_memory, sight))
        assert elbo(demos, log_pi, no_memory, myopic) == pytest.approx(best, abs=1e-12)


def run_em(seed, sight, reads_state, iterations=12):
    """J after every half step, J_NTP after every iteration, and the best J_NTP there is, -H(D)."""
    rng = np.random.default_rng(seed)
    demos, log_pi, log_prior = random_demos(rng), random_policy(rng, reads_state), random_prior(rng)
    bounds, likelihoods = [], [log_likelihood(demos, log_pi, log_prior)]
    for _ in range(iterations):
        log_q = e_step(demos, log_pi, log_prior, sight)
        bounds.append(elbo(demos, log_pi, log_prior, log_q))
        log_pi = m_step(demos, log_pi, log_q, a_axis)
        bounds.append(elbo(demos, log_pi, log_prior, log_q))
        likelihoods.append(log_likelihood(demos, log_pi, log_prior))
    return np.array(bounds), np.array(likelihoods), float((demos * np.log(demos)).sum())


def test_em_never_lowers_the_bound():
    """Eqs. (4.1), (4.2): neither step lowers J. With the paper's q, J_NTP itself falls now and then."""
    falls = 0
    for seed in range(15):
        bounds, likelihoods, _ = run_em(seed, "all", reads_state=False)
        assert np.diff(bounds).min() >= -1e-12 and bounds[-1] > bounds[0] + 1e-3
        assert np.diff(likelihoods).min() >= -1e-12 and likelihoods[-1] > likelihoods[0] + 1e-3
        np.testing.assert_allclose(likelihoods[:-1], bounds[0::2], atol=1e-12)  # tight after each E-step
        bounds, likelihoods, _ = run_em(seed, "past", reads_state=False)
        assert np.diff(bounds).min() >= -1e-12 and bounds[-1] > bounds[0] + 1e-3
        falls += np.diff(likelihoods).min() < -1e-3
    assert 0 < falls < 15


def test_thoughts_help_only_a_policy_that_cannot_read_the_state_well():
    """Section 4.1: with an unrestricted pi(a_t | s_t, z_t) one M-step is NTP's optimum, -H(D), whatever z."""
    for seed in range(5):
        bounds, likelihoods, ceiling = run_em(seed, "past", reads_state=True)
        assert likelihoods[0] < ceiling - 1e-2
        np.testing.assert_allclose(likelihoods[1:], ceiling, atol=1e-12)  # NTP's optimum after one M-step
        np.testing.assert_allclose(bounds[2:], ceiling, atol=1e-12)
        _, likelihoods, ceiling = run_em(seed, "past", reads_state=False)
        assert likelihoods[-1] < ceiling - 1e-3


def test_m_step_may_drop_the_kl_only_while_the_prior_does_not_move():
    """Eq. (4.2) holds for the fixed prior; with shared weights it can lower J, and the loss on all tokens cannot."""
    for seed in range(10):
        rng = np.random.default_rng(200 + seed)
        demos, log_pi, log_prior = random_demos(rng), random_policy(rng, False), random_prior(rng, memory=1)
        log_q = e_step(demos, log_pi, log_prior, "all")
        fitted = m_step(demos, log_pi, log_q, a_axis)
        best = elbo(demos, fitted, log_prior, log_q)
        for step_size in (1e-2, 1.0):
            rival = [log_normalise(mine + step_size * other, a_axis(t))
                     for t, (mine, other) in enumerate(zip(fitted, random_policy(rng, False)))]
            assert elbo(demos, rival, log_prior, log_q) < best
        fitted_prior = m_step(demos, log_prior, log_q, z_axis)
        assert elbo(demos, fitted, fitted_prior, log_q) > best + 1e-3
    # One weight for both: p(z=1) = sigmoid(theta), pi(a=1|z=1) = sigmoid(-theta), pi(a=1|z=0) = 1/2; a is 1.
    theta = np.linspace(-8.0, 8.0, 1601)
    log_p = -np.logaddexp(0.0, np.stack([theta, -theta]))  # [z, theta]
    log_a = np.stack([np.full_like(theta, -math.log(2.0)), -np.logaddexp(0.0, theta)])
    start = 800  # theta = 0
    q = np.exp(log_p + log_a)[:, start, None]
    q = q / q.sum()
    bound = (q * (log_a + log_p - np.log(q))).sum(axis=0)
    to_the_letter, all_tokens = (q * log_a).sum(axis=0).argmax(), (q * (log_a + log_p)).sum(axis=0).argmax()
    assert bound[to_the_letter] < bound[start] - 1.0
    assert bound[all_tokens] == bound.max() >= bound[start]


def test_the_likelihood_in_a3_conditions_causally():
    """(A.1), (A.3): given s_{0:T} latents have a posterior; what is bounded is the product of p(a_t | s_t), (2.1)."""
    rng = np.random.default_rng(400)
    demos, log_pi, log_prior = random_demos(rng), random_policy(rng), random_prior(rng)
    joint = np.exp(sum(log_pi) + sum(log_prior))
    latent_axes = tuple(range(STEPS, 2 * STEPS))
    p_a = joint.sum(axis=latent_axes, keepdims=True)
    assert p_a.sum() == pytest.approx(1.0, abs=1e-12)  # what (A.3) ends with is normalised over a_{0:T}
    upto = [p_a.sum(axis=tuple(range(t, STEPS)), keepdims=True) for t in range(STEPS + 1)]  # p(a_{0:t-1})
    chain = sum(np.log(upto[t + 1] / upto[t]) for t in range(STEPS))  # eq. (2.1): sum_t log p(a_t | s_t)
    causal = log_likelihood(demos, log_pi, log_prior)
    assert (demos * chain).sum() == pytest.approx(causal, abs=1e-12)
    literal = (demos * np.log(upto[STEPS] / upto[STEPS - 1])).sum()
    assert literal > causal + 0.5
    p_z0_given_states = joint.sum(axis=(STEPS - 1, *latent_axes[1:]), keepdims=True)
    p_z0_given_states /= p_z0_given_states.sum(axis=z_axis(0), keepdims=True)
    assert np.abs(p_z0_given_states - np.exp(log_prior[0])).max() > 0.05


def one_step_marginal(log_prior, evidence):
    """p(z_t | s_t, z_{t-1}): the prior with z_{0:t-2} averaged out, weighted by exp(evidence) too."""
    joint, shorter = np.exp(sum(log_prior) + evidence), []
    for t in range(STEPS):
        kept = {*range(t), *map(z_axis, range(max(0, t - 1), t + 1))}
        table = joint.sum(axis=tuple(axis for axis in ALL_AXES if axis not in kept), keepdims=True)
        shorter.append(log_normalise(np.log(table), z_axis(t)))
    return shorter


def test_what_the_prior_remembers():
    """Theorem 4.1's p(z_t | s_t, z_{t-1}) for a longer memory: a bound only if z_{0:t-2} is averaged out given the actions."""
    excess = []
    for seed in range(20):
        rng = np.random.default_rng(500 + seed)
        demos, log_pi, log_prior = random_demos(rng), random_policy(rng), random_prior(rng)
        target = log_likelihood(demos, log_pi, log_prior)
        given_actions = one_step_marginal(log_prior, sum(log_pi))
        assert np.abs(given_actions[2] - log_prior[2]).max() > 0.1  # something was forgotten
        assert log_likelihood(demos, log_pi, given_actions) == pytest.approx(target, abs=1e-12)
        alone = one_step_marginal(log_prior, 0.0 * demos)
        log_q = e_step(demos, log_pi, alone, "all")
        excess.append(elbo(demos, log_pi, alone, log_q) - target)
    assert max(excess) > 0.01


# ---------------------------------------------------------------- RA3, section 4.2 and Proposition 5.1: the prior and its KL


def plan_likelihood(emit, alpha, first=None):
    """p(a_{0:T}) under prior (4.3) on the thought in force; emit[t, z] = pi(a_t | z), first = p(z_0)."""
    thoughts = emit.shape[1]
    uniform = np.full(thoughts, 1.0 / thoughts)
    alive = (uniform if first is None else first) * emit[0]
    for t in range(1, len(emit)):
        alive = (alpha * alive + (1.0 - alpha) * alive.sum() * uniform) * emit[t]
    return alive.sum()


def test_act_means_keep_the_last_thought():
    """Section 5: exact if pi reads the thought in force; alpha = 1 is NTP only with z_0 = <act>."""
    rng = np.random.default_rng(600)
    steps, thoughts, alpha = 4, 3, 0.7
    emit = rng.uniform(0.05, 0.95, (steps, thoughts))  # pi(a_t | z) of one demonstration
    emit_act = rng.uniform(0.05, 0.95, steps)  # pi(a_t | <act>) when <act> carries nothing
    choices = range(-1, thoughts)  # -1 is <act>; z_0 is a thought, uniformly
    remembered = forgotten = 0.0
    for latents in itertools.product(range(thoughts), *[choices] * (steps - 1)):
        prior = math.prod(alpha if z < 0 else (1.0 - alpha) / thoughts for z in latents[1:]) / thoughts
        in_force, keeps, forgets = None, 1.0, 1.0
        for t, z in enumerate(latents):
            in_force = z if z >= 0 else in_force
            keeps *= emit[t, in_force]
            forgets *= emit[t, z] if z >= 0 else emit_act[t]
        remembered += prior * keeps
        forgotten += prior * forgets
    assert remembered == pytest.approx(plan_likelihood(emit, alpha), rel=1e-12)
    assert abs(math.log(forgotten / remembered)) > 0.05
    constant_plans = emit.prod(axis=0)
    assert plan_likelihood(emit, 1.0) == pytest.approx(constant_plans.mean(), rel=1e-12)
    for z, plan in enumerate(constant_plans):  # one plan, as in NTP, only if p(z_0) says so
        assert plan_likelihood(emit, 1.0, first=np.eye(thoughts)[z]) == pytest.approx(plan, rel=1e-12)


def entropy(p):
    p = p[p > 0]
    return float(-(p * np.log(p)).sum())


def kl(q, p):
    return float((q * np.log(q / p)).sum())


def bernoulli_kl(q_act, alpha):
    return kl(np.array([q_act, 1 - q_act]), np.array([alpha, 1 - alpha]))


def act_prior(alpha, thoughts):
    """Prior (4.3) with z_{t-1} renamed <act> (index 0) and U over the thoughts: the reading of (A.4)."""
    return np.array([alpha] + [(1.0 - alpha) / thoughts] * thoughts)


def prop_5_1_cases():
    """q over <act> and K thoughts, alpha, K."""
    rng = np.random.default_rng(700)
    for _ in range(200):
        thoughts = int(rng.integers(2, 9))
        q_act, alpha = rng.uniform(0.02, 0.98, 2)
        yield np.r_[q_act, (1 - q_act) * rng.dirichlet(np.ones(thoughts))], float(alpha), thoughts


def test_kl_of_proposition_5_1():
    """Proposition 5.1 and A.5, off in both versions. With q_bar = q(. | think) and H_B the entropy of Bern(q_act),

    KL(q || p) = KL_B + (1 - q_act) KL(q_bar || U) = KL_B - H(q) + H_B(q_act) + (1 - q_act) log K.
    """
    v2_consts = []
    for q, alpha, thoughts in prop_5_1_cases():
        q_act, log_k, uniform = q[0], math.log(thoughts), np.full(thoughts, 1 / thoughts)
        think, q_bar = 1 - q_act, q[1:] / (1 - q_act)
        exact, binary = kl(q, act_prior(alpha, thoughts)), bernoulli_kl(q_act, alpha)
        h, h_bar, h_b = entropy(q), entropy(q_bar), entropy(np.array([q_act, think]))
        line_2 = binary - think * kl(q_bar, uniform)  # A.5's last display: the sign is wrong from here on
        line_3 = binary - (q[1:] * np.log(q[1:] / (uniform * think))).sum()
        line_4 = binary - (q[1:] * np.log(q[1:])).sum() + think * math.log(think) - think * log_k
        both = alpha + (1 - alpha) / (thoughts + 1)  # the mass of <act> if U covers it, too
        everywhere = alpha * np.eye(thoughts + 1)[0] + (1 - alpha) / (thoughts + 1)
        c = math.log(alpha * thoughts / (1 - alpha))  # Algorithm 1's penalty
        for mine, theirs in (
            (exact, binary + think * kl(q_bar, uniform)),
            (exact, binary - h + (h_b + think * log_k)),  # v2 prints KL_B - H(q) + const
            (exact, binary - think * h_bar + think * log_k),  # v1 prints KL_B - (1 - q_act) H, if of q_bar
            (exact, binary - think * h + think * (log_k + h_b - q_act * h_bar)),  # and if of q
            (exact, q_act * math.log(q_act / alpha) + (q[1:] * np.log(q[1:] / ((1 - alpha) * uniform))).sum()),  # (A.4)
            (exact, q_act * math.log(q_act / alpha) + think * (math.log(think / (1 - alpha)) - h_bar + log_k)),  # (A.5)
            (line_2, line_3), (line_2, line_4), (exact - line_2, 2 * think * kl(q_bar, uniform)),
            (line_4, binary + h - h_b - think * log_k),  # line 5 flips the sign of H(q) back, and drops H_B
            (exact - kl(q, everywhere), q_act * math.log(both / alpha) + think * math.log((1 - both) / (1 - alpha))),
            (exact, c * think - h - math.log(alpha)),  # the KL with the entropy taken out
        ):  # fmt: skip
            assert mine == pytest.approx(theirs, abs=1e-12)
        np.testing.assert_allclose(everywhere, act_prior(both, thoughts), rtol=1e-12)
        v2_consts += [h_b + think * log_k] * (thoughts == 4)
    assert max(v2_consts) - min(v2_consts) > 0.8  # the "const" of one and the same K, in nats


def test_the_fixed_penalty_is_the_kl_with_the_entropy_taken_out():
    """Algorithm 1 (the identity is in the test above): c is the gain at which q thinks; without entropy q is hard."""
    c, thoughts = 0.05, 50
    alpha = math.exp(c) / (thoughts + math.exp(c))
    prior = act_prior(alpha, thoughts)
    assert prior[0] / prior[1] == pytest.approx(1.05, abs=2e-3)
    for best_gain in (0.04, 0.06):
        gain = np.r_[0.0, best_gain, np.full(thoughts - 1, -1.0)]  # one thought that may be worth c
        penalised = gain - c * (np.arange(thoughts + 1) > 0)
        exact = prior * np.exp(gain)
        for entropy_weight in (1.0, 1e-3):
            q = np.exp((penalised - penalised.max()) / entropy_weight)
            q /= q.sum()
            assert math.log(q[1] / q[0]) == pytest.approx((best_gain - c) / entropy_weight, rel=1e-9)
            if entropy_weight == 1.0:
                np.testing.assert_allclose(q, exact / exact.sum(), rtol=1e-12)
        assert q[0 if best_gain < c else 1] > 0.999


def test_the_printed_kl_moves_the_decision_to_think():
    """Proposition 5.1 as the penalty of K thoughts that gain nothing: where q_act goes without the missing terms."""
    alpha, q_act = 0.9, np.linspace(1e-4, 1 - 1e-4, 99_981)
    logit = math.log(alpha / (1 - alpha))
    h_b = -(q_act * np.log(q_act) + (1 - q_act) * np.log(1 - q_act))
    binary = q_act * np.log(q_act / alpha) + (1 - q_act) * np.log((1 - q_act) / (1 - alpha))
    for thoughts in (10, 1000):
        log_k = math.log(thoughts)  # q_bar is uniform, so H(q_bar) = log K and H(q) = H_B + (1 - q_act) log K
        exact = q_act[binary.argmin()]
        v2 = q_act[(binary - h_b - (1 - q_act) * log_k).argmin()]
        v1 = q_act[(binary - (1 - q_act) * log_k).argmin()]
        assert exact == pytest.approx(alpha, abs=1e-4)
        assert v2 == pytest.approx(1 / (1 + math.exp(-(logit - log_k) / 2)), abs=1e-4)
        assert v1 == pytest.approx(1 / (1 + math.exp(-(logit - log_k))), abs=1e-4)
        assert v1 < v2 < exact - 0.3


# ---------------------------------------------------------------- RA3, section 3: small MDPs
#
# jump[z, s, s'] = E[gamma^tau 1(s')], the discount included (gamma * P when tau = 1), and gain[z, s] = the
# expected discounted reward of z from s, so that one helper serves primitive actions and options.


def policy_values(jump, gain, policy):
    """V of policy[s, z], exactly: (I - M_pi) V = r_pi."""
    m, r = np.einsum("sz,zst->st", policy, jump), np.einsum("sz,zs->s", policy, gain)
    return np.linalg.solve(np.eye(len(r)) - m, r)


def policy_iteration(jump, gain, start):
    """The values V^{pi_0}, V^{pi_1}, ... until no action is strictly better; deterministic policies."""
    states, one_hot, values = np.arange(gain.shape[1]), np.eye(gain.shape[0]), []
    policy = np.array(start)
    while True:
        values.append(policy_values(jump, gain, one_hot[policy]))
        backup = gain + jump @ values[-1]  # [Z, S]
        better = backup.max(axis=0) > backup[policy, states] + 1e-12
        if not better.any():
            return values
        policy = np.where(better, backup.argmax(axis=0), policy)


def optimal_values(jump, gain):
    return policy_iteration(jump, gain, np.zeros(gain.shape[1], dtype=int))[-1]


def random_mdp(rng, actions, states):
    """P [Z, S, S] and R [Z, S] in [0, 1]."""
    return rng.dirichlet(np.full(states, 0.5), (actions, states)), rng.uniform(0, 1, (actions, states))


def test_regret_decomposition():
    """Lemma 3.2 holds for a pi that acts in Z'; renormalising another, or putting V_M^pi in its place, breaks it."""
    rng = np.random.default_rng(800)
    gamma, subset, tasks = 0.9, [0, 2], 30
    regret = pruning = rl = renormalised_rl = 0.0
    for _ in range(tasks):
        transitions, gain = random_mdp(rng, actions=4, states=5)
        jump = gamma * transitions
        best, best_in_subset = optimal_values(jump, gain)[0], optimal_values(jump[subset], gain[subset])[0]
        assert best_in_subset <= best + 1e-12
        policy = rng.dirichlet(np.ones(2), 5)
        embedded = np.zeros((5, 4))
        embedded[:, subset] = policy
        regret += best - policy_values(jump, gain, embedded)[0]
        pruning += best - best_in_subset
        rl += best_in_subset - policy_values(jump[subset], gain[subset], policy)[0]
        outside = rng.dirichlet(np.ones(4), 5)
        value = policy_values(jump, gain, outside)[0]
        inside = outside[:, subset] / outside[:, subset].sum(axis=1, keepdims=True)
        renormalised = policy_values(jump[subset], gain[subset], inside)[0]
        renormalised_rl += abs((best - value) - (best - best_in_subset) - (best_in_subset - renormalised))
    assert regret == pytest.approx(pruning + rl, abs=1e-9) and min(regret, pruning, rl) > 1.0
    assert renormalised_rl / tasks > 0.1
    assert best_in_subset - best < -0.05  # the "RL error" of the optimal policy, which leaves Z'


SKILLS = [0.6, 0.5, 0.3, 0.3, 0.1, 0.0, 0.0]  # share of tasks an action is useful in; 0 and 1 cover all


def skill_family(rng, size, gamma, tasks=24, states=2):
    """Delta(M, Z') [tasks, subsets] of a random family of tasks and every subset Z' with `size` actions."""
    subsets = list(itertools.combinations(range(len(SKILLS)), size))
    losses = np.zeros((tasks, len(subsets)))
    for m in range(tasks):
        transitions, gain = random_mdp(rng, len(SKILLS), states)
        useful = rng.uniform(size=len(SKILLS)) < SKILLS
        useful[1] |= not useful[0]
        gain = np.where(useful[:, None], 0.9 + 0.1 * gain, 0.6 * gain)
        jump = gamma * transitions
        best = optimal_values(jump, gain)[0]
        losses[m] = [best - optimal_values(jump[list(z)], gain[list(z)])[0] for z in subsets]
    return subsets, losses


def test_pruning_error_against_the_number_of_demonstrations():
    """Theorem 3.4 holds with constant 1 in the Theta, for the rule "reject if Delta > eps".

    The rule as printed rejects the good subsets at the first demonstration and keeps those that are bad on every task.
    """
    gamma, eps, sigma, delta = 0.5, 0.25, 0.25, 0.1
    _, alone = skill_family(np.random.default_rng(900), 1, gamma)
    subsets, losses = skill_family(np.random.default_rng(900), 2, gamma)
    core, useless = subsets.index((0, 1)), subsets.index((5, 6))
    assert losses[:, core].max() <= eps < alone.max(axis=0).min()  # two actions do, one does not: |Z_eps| = 2
    error, bad_on = losses.mean(axis=0), losses > eps  # E[Delta] [subsets], [tasks, subsets]
    suboptimal = bad_on.mean(axis=0) >= sigma  # Definition A.1
    bound = eps * (1 - sigma) + sigma / (1 - gamma)
    assert suboptimal.sum() >= 10 and (error[~suboptimal] <= bound).all() and error[useless] > bound
    n = math.ceil(2 * math.log(len(SKILLS) / delta) / sigma)
    assert math.comb(len(SKILLS), 2) * math.exp(-sigma * n) <= delta  # the union bound
    runs = 1000
    seen = bad_on[np.random.default_rng(901).integers(len(losses), size=(runs, n))]  # [runs, n, subsets]
    survives = ~np.maximum.accumulate(seen, axis=1)  # after 1..n demonstrations
    assert survives[:, :, core].all()  # so a surviving subset always exists
    worst = np.where(survives, error, 0.0).max(axis=2)  # [runs, n]: an unlucky choice among the survivors
    failed = (survives & suboptimal).any(axis=2).mean(axis=0)  # [n]: how often a bad subset survives
    assert (worst[:, -1] <= bound).mean() >= 1 - delta and failed[-1] <= delta
    assert (worst[:, 0] <= bound).mean() < 1 - delta < failed[0]  # one demonstration is not enough
    mean_worst = worst.mean(axis=0)
    assert (np.diff(mean_worst) <= 0).all() and mean_worst[-1] < 0.5 * mean_worst[0]
    for step in (0, 3, 9):  # (1 - sigma)^n bounds the survival of a bad subset
        rate = survives[:, step].mean(axis=0)  # [subsets]
        chance = (1 - bad_on.mean(axis=0)) ** (step + 1)
        np.testing.assert_allclose(rate, chance, atol=4 * 0.5 / math.sqrt(runs))
        assert (chance[suboptimal] <= (1 - sigma) ** (step + 1)).all()
    printed_survives = seen.all(axis=1)  # no demonstration with V* <= V*_Z' + eps
    assert not printed_survives[:, core].any() and printed_survives[:, useless].all()
    assert error[printed_survives.any(axis=0)].min() > bound


def make_option(transitions, reward, gamma, durations):
    """jump and gain of repeating a primitive action for tau ~ durations {tau: probability} steps.

    The reward is sum_{k=1..tau} gamma^(k-1) R_k, R_k being the reward of the k-th primitive step.
    """
    states = len(reward)
    jump, gain, reach, earned = np.zeros((states, states)), np.zeros(states), np.eye(states), np.zeros(states)
    for k in range(1, max(durations) + 1):
        earned = earned + reach @ reward
        reach = gamma * reach @ transitions
        jump += durations.get(k, 0.0) * reach
        gain += durations.get(k, 0.0) * earned
    return jump, gain


def options(transitions, rewards, gamma, durations):
    pairs = [make_option(p, r, gamma, durations) for p, r in zip(transitions, rewards)]
    return np.stack([jump for jump, _ in pairs]), np.stack([gain for _, gain in pairs])


def test_bellman_operator_contracts_by_gamma_bar():
    """Theorem 3.5, A.3: a gamma-bar contraction; (1) the discount counted twice and (2) the missing brackets break it.

    R_tau = sum_{k=1..tau} gamma^(k-1) R_k; with the printed gamma^k every value is gamma times too small.
    """
    rng = np.random.default_rng(1000)
    gamma, durations = 0.9, {2: 0.5, 6: 0.5}
    transitions, rewards = random_mdp(rng, 3, 6)
    jump, gain = options(transitions, rewards, gamma, durations)
    gamma_bar = jump.sum(axis=2).max()
    assert gamma_bar == pytest.approx(0.5 * gamma**2 + 0.5 * gamma**6) and gamma_bar < gamma

    def backup(v):
        return (gain + jump @ v).max(axis=0)
    ratios = []
    for _ in range(200):
        v_1, v_2 = rng.standard_normal((2, 6))
        ratios.append(np.abs(backup(v_1) - backup(v_2)).max() / np.abs(v_1 - v_2).max())
    assert max(ratios) <= gamma_bar + 1e-12
    assert np.abs(backup(v_1 + 1.0) - backup(v_1)).max() == pytest.approx(gamma_bar)  # no smaller factor does
    best = optimal_values(jump, gain)
    assert np.abs(backup(best) - best).max() < 1e-12
    twice = optimal_values(options(transitions, rewards, gamma**2, durations)[0], gain)  # (1)
    assert np.abs(twice - best).max() > 0.1
    for tau, z in itertools.product((1, 2, 4), range(3)):
        jump_z, gain_z = options(transitions, rewards, gamma, {tau: 1.0})
        always = np.eye(3)[np.full(6, z)]
        flat = policy_values(gamma * transitions, rewards, always)
        np.testing.assert_allclose(policy_values(jump_z, gain_z, always), flat, rtol=1e-12)
        printed = optimal_values(jump_z, gamma * gain_z)
        np.testing.assert_allclose(printed, gamma * optimal_values(jump_z, gain_z), rtol=1e-10)
    v = np.full(6, -1.0)  # (2): V_1 = V_2 = v has norm 0
    assert (jump @ v - v).max() == pytest.approx(1 - gamma_bar) and 1 - gamma_bar > 0.1


def chain(tau, gamma, steps=24):
    """States 0..steps, the last absorbing and paying 1 a step; options: go left or right for tau steps."""
    moves = np.clip(np.arange(steps + 1) + np.array([[-1], [1]]), 0, steps)
    moves[:, -1] = steps
    rewards = np.zeros((2, steps + 1))
    rewards[:, -1] = 1.0
    return options(np.eye(steps + 1)[moves], rewards, gamma, {tau: 1.0})


def test_longer_options_converge_in_fewer_sweeps():
    """Theorem 3.5 (v2): faster with tau, but by a factor log(1 / (1 - gamma-bar)) more than printed, to a lower optimum."""
    gamma, eps, improvements, sweeps = 0.9, 1e-6, [], []
    taus = (1, 2, 3, 4, 6, 8)
    best = gamma**24 / (1 - gamma)
    for tau in taus:
        jump, gain = chain(tau, gamma)
        gamma_bar = jump.sum(axis=2).max()
        assert gamma_bar == pytest.approx(gamma**tau)
        values = policy_iteration(jump, gain, np.zeros(25, dtype=int))
        assert values[-1][0] == pytest.approx(best)  # the options lose nothing from s_0
        errors = [np.abs(values[-1] - v).max() for v in values]
        assert all(e <= gamma_bar**n * errors[0] + 1e-9 for n, e in enumerate(errors))
        n_star = math.ceil(math.log(1 / (1 - gamma_bar)) / math.log(1 / gamma_bar)) + 1
        improvements.append(len(values) - 1)
        assert improvements[-1] <= (25 * 2 - 25) * n_star
        v, count = np.zeros(25), 0
        while np.abs(v - values[-1]).max() > eps:
            v, count = (gain + jump @ v).max(axis=0), count + 1
        sweeps.append(count)
    assert improvements == [24 // tau for tau in taus]
    needed = math.log(1 / (eps * (1 - gamma))) / math.log(1 / gamma)
    assert sweeps == [math.ceil(needed / tau) for tau in taus]

    def first_n(gamma_bar):
        return math.log(1 / (1 - gamma_bar)) / math.log(1 / gamma_bar)
    scaled = [first_n(g) * (1 - g) for g in (0.9, 0.99, 0.999, 0.9999)]  # bounded, if the O were right
    assert (np.diff(scaled) > 2.0).all()
    transitions, rewards = random_mdp(np.random.default_rng(1150), 3, 5)
    flat, four = (optimal_values(*options(transitions, rewards, gamma, {tau: 1.0})) for tau in (1, 4))
    assert (four < flat - 0.1).all()


def test_v1_value_iteration_bound():
    """Theorem 3.5 (v1): the N of the proof, with 1 - gamma in the logarithm, is enough; that of the statement is not."""
    gamma, tau, eps = 0.999, 3, 0.01
    jump, gain = make_option(np.eye(1), np.ones(1), gamma, {tau: 1.0})
    gamma_bar, best = jump.item(), 1 / (1 - gamma)

    def error(sweeps):
        v = 0.0
        for _ in range(sweeps):
            v = gain.item() + gamma_bar * v
        return best - v
    proof = math.ceil(math.log(1 / (eps * (1 - gamma))) / (1 - gamma_bar))
    statement = math.ceil(math.log(1 / (eps * (1 - gamma_bar))) / (1 - gamma_bar))
    assert error(proof) <= eps and error(proof - 2) <= eps  # enough, and a little less is enough too
    assert error(statement) == pytest.approx(tau * eps, rel=0.05)


# ---------------------------------------------------------------- RMT, section 4


def test_token_budget_and_curriculum():
    """RMT eqs. (1), (3), (4). With the paper's numbers B_T = 160 whatever T is: B_min = 1 is never reached."""
    for total in (10, 320):
        schedule = [token_budget(t, total, 800, 1, 0.2) for t in range(total + 1)]
        assert schedule[0] == 800 and schedule[-1] == min(schedule) == 160 and (np.diff(schedule) <= 0).all()
    assert [token_budget(t, 320, 800, 300, 0.2) for t in range(321)] == [max(300, b) for b in schedule]
    p_1, p_2 = np.array([0.5, 0.4, 0.1]), np.array([0.1, 0.4, 0.5])
    schedule = np.array([curriculum_probs(t, 30, 70, p_1, p_2) for t in range(101)])
    np.testing.assert_allclose(schedule.sum(axis=1), 1.0, atol=1e-12)
    assert (schedule >= 0).all() and (schedule[:31] == p_1).all() and (schedule[70:] == p_2).all()
    np.testing.assert_allclose(np.diff(schedule[30:71], axis=0), np.tile((p_2 - p_1) / 40, (40, 1)), atol=1e-12)


def test_length_reward_and_composite_reward():
    """RMT eqs. (2), (5): a right answer outranks a wrong one only if w < 1 / (1 + r_max)."""
    for budget, r_max in ((1, 1.0), (7, 0.5), (160, 1.0)):
        rewards = np.array([length_reward(length, budget, r_max) for length in range(3 * budget + 1)])
        assert rewards.argmax() == budget and rewards[budget] == r_max
        slopes = np.diff(rewards)
        np.testing.assert_allclose(slopes[:budget], r_max / budget, atol=1e-12)
        np.testing.assert_allclose(slopes[budget : 2 * budget], -r_max / budget, atol=1e-12)
        assert (rewards[2 * budget :] == 0).all() and rewards[0] == 0
        for w in (0.9 / (1 + r_max), 1.1 / (1 + r_max)):
            assert ((1 - w) * 1 + w * rewards.min() > w * rewards.max()) == (w < 1 / (1 + r_max))


def whitened(rewards):
    return group_advantages(torch.tensor(rewards, dtype=torch.float64)[None])[0].numpy()


def test_whitened_advantages():
    """RMT eq. (6). In a group all right or all wrong w cancels: the length reward acts at full size."""
    rewards = np.random.default_rng(1200).uniform(size=8)
    advantages, spread = whitened(rewards), rewards.std(ddof=1)
    assert advantages.mean() == pytest.approx(0.0, abs=1e-12) and (whitened(np.ones(8)) == 0).all()
    assert advantages.std(ddof=1) == pytest.approx(spread / (spread + 1e-4), rel=1e-12)
    for w in (0.01, 0.5):
        np.testing.assert_allclose(whitened(1 - w + w * rewards), advantages, rtol=0.05)


def test_ntp_mask():
    """RMT eq. (8): C as positions; as token values, as printed, other occurrences are lost to both losses."""
    tokens, selected = np.array([5, 3, 5, 7, 3, 5]), [2, 3]
    by_position = ~np.isin(np.arange(6), selected)
    by_value = ~np.isin(tokens, tokens[selected])
    assert by_position.sum() + len(selected) == len(tokens) and not by_position[selected].any()
    assert by_value.tolist() == [False, True, False, False, True, False]  # positions 0 and 5 are lost
    assert by_value.sum() + len(selected) == len(tokens) - 2


def test_the_sign_of_the_total_loss():
    """RMT eq. (9): only -L_RL + lambda L_NTP, minimised, raises both the reward and the likelihood."""
    group, weight, beta, reference = 8, 0.1, 0.01, 0.0

    def sigmoid(x):
        return 1 / (1 + math.exp(-x))

    def rl_gradient(theta):  # d/dtheta of eq. (7), on policy
        p, total = sigmoid(theta), 0.0
        for k in range(group + 1):  # k right answers
            right = np.arange(group) < k
            advantages = whitened(right)
            score = np.where(right, 1 - p, -p)  # d log pi(o) / dtheta
            total += math.comb(group, k) * p**k * (1 - p) ** (group - k) * (advantages * score).mean()
        kl_gradient = p * (1 - p) * (theta - reference)  # d KL(pi_theta || pi_ref) / dtheta
        return total - beta * kl_gradient

    def ntp_gradient(phi):  # the positions that RL left out, eq. (8), with a parameter of their own
        return -(1 - sigmoid(phi))

    def train(rl_sign, ntp_sign, steps=50, rate=0.5):  # descent on rl_sign * L_RL + ntp_sign * lambda * L_NTP
        theta = phi = 0.0
        for _ in range(steps):
            theta -= rate * rl_sign * rl_gradient(theta)
            phi -= rate * ntp_sign * weight * ntp_gradient(phi)
        return sigmoid(theta), sigmoid(phi)
    reward, likelihood = train(+1, +1)  # eq. (9) as printed, minimised
    assert reward < 0.1 and likelihood > 0.6
    reward, likelihood = train(-1, -1)  # eq. (9) as printed, maximised
    assert reward > 0.9 and likelihood < 0.4
    reward, likelihood = train(-1, +1)
    assert reward > 0.9 and likelihood > 0.6
