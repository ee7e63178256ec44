"""A method of one's own: its coefficients are all that the kernel, the optimizers and the analysis need.

python examples/own_rule.py
"""

import torch

import gut_fast as gf


@gf.update_rule("r")
def damped_gut(lr: float, mu: float = 0.9, gamma: float = 0.5) -> gf.Coefficients:
    """GUT with an averaging rate γ of its own: S = z − η(g + μr);  z' = S + γD;  r' = μr − γD/η.

    Columns of A and B are z, r, g; C multiplies S, and E the drift D.
    """
    return gf.Coefficients(
        A=[[1, -lr * mu, -lr]],
        B=[[0, 0, 0], [0, mu, 0]],
        C=[[1], [0]],
        E=[[gamma], [-gamma / lr]],
    )


ring = gf.topology.ring(16)
data = gf.data.digits()
parts = gf.data.partition.dirichlet(data.train_labels, 16, alpha=0.01, seed=0)


def accuracy(rule: str, lr: float, **hyperparameters: float) -> float:
    """The accuracy of the averaged model after 400 steps; before them it is said what theory expects."""
    expected = gf.analysis.predict(rule, {"lr": lr, **hyperparameters}, ring)
    print(f"{rule}: bias {expected.bias_factor:.2f} of DSGD's, consensus rate {expected.stability.consensus_rate:.3f}")
    simulator = gf.Simulator(
        gf.models.mlp(64, [32], 10),
        ring,
        optimizer=lambda params: gf.GossipOptimizer(params, rule, lr=lr, topology=ring, **hyperparameters),
        data=data,
        parts=parts,
        batch_size=16,
        engine="vmap",
    )
    return float(simulator.run(400, milestones=[0.5, 0.75], progress=False)[-1]["test_accuracy"])


# The rule as code is what the kernel runs; one step beside plain PyTorch shows that they agree.
agents = gf.stack(torch.nn.Linear(3, 2), 16)
optimizer = gf.GossipOptimizer(agents.parameters(), "damped_gut", lr=0.1, mu=0.8, topology=ring)
before = [each.detach().clone() for each in agents.parameters()]
agents(torch.randn(16, 4, 3)).square().sum().backward()
optimizer.step()
for each, z in zip(agents.parameters(), before, strict=True):
    state = gf.reference.zero_state("damped_gut", z)
    expected, _ = gf.reference.step("damped_gut", {"lr": 0.1, "mu": 0.8}, z, state, each.grad, ring.matrix())
    torch.testing.assert_close(each.detach(), expected)

for name, options in (("dsgd", {}), ("gut", {"mu": 0.9}), ("damped_gut", {"mu": 0.8, "gamma": 0.8})):
    print(f"{name}: accuracy of the averaged model {accuracy(name, lr=0.4, **options):.1%}")
