"""The stack and its optimizer within what others train, average, compile and save modules with."""

import copy

import pytest
import torch
from torch import nn, vmap
from torch.distributed.checkpoint import state_dict as distributed_state
from torch.nn.functional import cross_entropy
from torch.optim.swa_utils import AveragedModel
from torch.utils.data import DataLoader, Dataset

import gut_fast as gf
from torchvision_shim import mend_torchvision

NUM_AGENTS = 3
TOPOLOGY = gf.topology.ring(NUM_AGENTS)
MAX_NORM = 0.5


class Batches(Dataset):
    """Batches of all agents, the same in every run: (N, B, 4) and (N, B)."""

    def __len__(self):
        return 8

    def __getitem__(self, index):
        generator = torch.Generator().manual_seed(index)
        inputs = torch.randn(NUM_AGENTS, 5, 4, generator=generator)
        return inputs, torch.randint(3, (NUM_AGENTS, 5), generator=generator)


def loader():
    return DataLoader(Batches(), batch_size=None)


def at_once(agents, inputs, targets):
    return vmap(cross_entropy)(agents(inputs), targets).sum()


def one_by_one(agents, inputs, targets):
    return sum(cross_entropy(agents.agent(i)(inputs[i]), targets[i]) for i in range(NUM_AGENTS))


def make(seed=0):
    torch.manual_seed(seed)
    agents = gf.stack(nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)), NUM_AGENTS)
    optimizer = gf.GUT(agents.parameters(), lr=0.2, mu=0.5, topology=TOPOLOGY)
    return agents, optimizer, torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 20)


def train(agents, optimizer, scheduler, epochs, loss=at_once):
    """The loop that the libraries should run: two batches accumulated, each agent clipped, a schedule by step."""
    for _ in range(epochs):
        for step, batch in enumerate(loader()):
            (loss(agents, *batch) / 2).backward()
            if step % 2:
                gf.clip_grad_norm_per_agent_(agents.parameters(), MAX_NORM)
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()


def tensors(agents, optimizer):
    """All that training changes."""
    state = [value for own in optimizer.state.values() for value in own.values()]
    return [*agents.state_dict().values(), *state]


def assert_equal(one, other):
    for own, expected in zip(tensors(*one), tensors(*other), strict=True):
        assert torch.equal(own, expected)
    assert one[1].num_steps == other[1].num_steps


@pytest.fixture(scope="module")
def trained():
    """What a plain loop makes of agents and optimizer in four epochs."""
    agents, optimizer, scheduler = make()
    train(agents, optimizer, scheduler, 4)
    return agents, optimizer


def lightning_module(loss, seed=0):
    lightning = pytest.importorskip("lightning")

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.agents, self.optimizer, self.scheduler = make(seed)

        def training_step(self, batch, index):
            return loss(self.agents, *batch)

        def configure_gradient_clipping(self, optimizer, gradient_clip_val=None, gradient_clip_algorithm=None):
            gf.clip_grad_norm_per_agent_(self.agents.parameters(), gradient_clip_val)

        def configure_optimizers(self):
            schedule = {"scheduler": self.scheduler, "interval": "step"}
            return {"optimizer": self.optimizer, "lr_scheduler": schedule}

    return Module()


def fit(module, epochs, folder, checkpoint=None):
    lightning = pytest.importorskip("lightning")
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = lightning.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        devices=1,
        gradient_clip_val=MAX_NORM,
        accumulate_grad_batches=2,
        enable_checkpointing=False,
        default_root_dir=folder,
        **quiet,
    )
    trainer.fit(module, loader(), ckpt_path=checkpoint)
    return trainer


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("loss", [at_once, one_by_one])
def test_lightning_trains_as_the_plain_loop_and_goes_on_from_its_checkpoint(tmp_path, trained, loss):
    mend_torchvision()
    fit(lightning_module(loss), 2, tmp_path).save_checkpoint(tmp_path / "half.ckpt")
    module = lightning_module(loss, seed=1)
    fit(module, 4, tmp_path, tmp_path / "half.ckpt")
    if loss is at_once:
        assert_equal((module.agents, module.optimizer), trained)
    else:
        for own, expected in zip(tensors(module.agents, module.optimizer), tensors(*trained), strict=True):
            torch.testing.assert_close(own, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore")
def test_lightning_clips_all_agents_by_one_norm_if_it_is_left_to(tmp_path):
    mend_torchvision()
    module = lightning_module(at_once)
    del type(module).configure_gradient_clipping
    fit(module, 1, tmp_path)
    agents, optimizer, scheduler = make()
    for step, batch in enumerate(loader()):
        (at_once(agents, *batch) / 2).backward()
        if step % 2:
            nn.utils.clip_grad_norm_(agents.parameters(), MAX_NORM)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
    assert_equal((module.agents, module.optimizer), (agents, optimizer))


@pytest.fixture
def accelerator():
    accelerate = pytest.importorskip("accelerate")
    yield accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    accelerate.state.GradientState._reset_state()


def accelerated(accelerator, prepared, epochs):
    agents, optimizer, scheduler, batches = prepared
    for _ in range(epochs):
        for batch in batches:
            with accelerator.accumulate(agents):
                accelerator.backward(at_once(agents, *batch))
                if accelerator.sync_gradients:
                    gf.clip_grad_norm_per_agent_(agents.parameters(), MAX_NORM)
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()


@pytest.mark.filterwarnings("ignore")
def test_accelerate_trains_as_the_plain_loop_and_loads_what_it_has_saved(tmp_path, accelerator, trained):
    prepared = accelerator.prepare(*make(), loader())
    accelerated(accelerator, prepared, 2)
    accelerator.save_state(tmp_path / "half")
    accelerated(accelerator, prepared, 1)  # is forgotten when the state is loaded
    accelerator.load_state(tmp_path / "half")
    accelerated(accelerator, prepared, 2)
    assert_equal((prepared[0], prepared[1].optimizer), trained)


def test_states_of_torch_distributed_checkpoint_go_on_to_the_same_end(trained):
    agents, optimizer, scheduler = make()
    train(agents, optimizer, scheduler, 2)
    states = copy.deepcopy(distributed_state.get_state_dict(agents, optimizer))
    schedule = scheduler.state_dict()
    agents, optimizer, scheduler = make(seed=1)
    distributed_state.set_model_state_dict(agents, states[0])
    distributed_state.set_optimizer_state_dict(agents, optimizer, states[1])
    scheduler.load_state_dict(schedule)
    train(agents, optimizer, scheduler, 2)
    for own, expected in zip(tensors(agents, optimizer), tensors(*trained), strict=True):
        assert torch.equal(own, expected)


def test_averaged_model_averages_every_agent_over_time():
    agents, optimizer, scheduler = make()
    averaged, seen = AveragedModel(agents), []
    for _ in range(3):
        train(agents, optimizer, scheduler, 1)
        averaged.update_parameters(agents)
        seen.append([each.detach().clone() for each in agents.parameters()])
    for own, *others in zip(averaged.module.parameters(), *seen, strict=True):
        torch.testing.assert_close(own.detach(), sum(others) / 3)
    inputs = torch.randn(NUM_AGENTS, 5, 4)
    outputs = averaged(inputs)
    for i in range(NUM_AGENTS):
        torch.testing.assert_close(outputs[i], averaged.module.agent(i)(inputs[i]))


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # of what dynamo looks at where its graph breaks
def test_compiled_agents_have_the_same_outputs_and_gradients():
    (agents, *_), (expected, *_) = make(), make()
    compiled = torch.compile(agents, backend="aot_eager")
    for batch in loader():
        losses = [at_once(compiled, *batch), at_once(expected, *batch)]
        for loss in losses:
            loss.backward()
        torch.testing.assert_close(*losses)
    for own, other in zip(agents.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(own.grad, other.grad)


def test_batches_of_all_agents_from_any_data_set():
    parts = [torch.tensor([0, 1, 2, 3, 4]), [5, 6], [7]]
    sampler = gf.data.AgentBatchSampler(parts, 2, generator=torch.Generator().manual_seed(0))
    epochs = [list(sampler) for _ in range(2)]
    assert len(sampler) == 3
    assert epochs[0] != epochs[1]
    for epoch in epochs:
        orders = torch.tensor(epoch).unflatten(1, (3, 2)).transpose(0, 1).flatten(1).tolist()
        assert sorted(orders[0])[:1] == [0]
        assert set(orders[0]) == {0, 1, 2, 3, 4}
        assert [set(orders[1][k : k + 2]) for k in (0, 2, 4)] == [{5, 6}] * 3
        assert set(orders[2]) == {7}
    again = gf.data.AgentBatchSampler(parts, 2, generator=torch.Generator().manual_seed(0))
    assert list(again) == epochs[0]


@pytest.mark.parametrize(
    ("parts", "batch_size", "error", "message"),
    [
        ([], 2, ValueError, "at least one agent"),
        ([[0], []], 2, (TypeError, ValueError), "agent 1"),
        ([[0], torch.tensor([], dtype=torch.int64)], 2, ValueError, "agent 1 has no samples"),
        ([[0.5]], 2, TypeError, "the part of agent 0 must be a 1-D sequence of integers"),
        ([[[0]]], 2, TypeError, r"got shape \(1, 1\)"),
        ([[0]], 0, ValueError, "batch_size must be at least 1"),
    ],
)
def test_bad_parts_are_refused(parts, batch_size, error, message):
    with pytest.raises(error, match=message):
        gf.data.AgentBatchSampler(parts, batch_size)
