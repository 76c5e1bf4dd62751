SMALL = [
    "network={heads: 2, head_dim: 8, layers: 2, ffn: 24}",
    "data={sprites: 2, torus: 12}",
    "chunks=[2,2,2]",
    "window=6",
    "sink=2",
    "pretrain={steps: 2, batch: 4}",
    "ode={steps: 2, batch: 4, pairs: 8, solver_steps: 4}",
    "asd={steps: 4, batch: 4, fake_per_generator: 2, layers: [0, 1]}",
    "evaluate={every: 2, clips: 4, final_clips: 4, show: 2, batch: 4, teacher_steps: 3}",
    "checkpoint_every=1",
]
