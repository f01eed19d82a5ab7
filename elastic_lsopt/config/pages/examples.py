"""An example of each key, as one would write it, with what it needs beside it. The settings' reader has read each."""

MODEL = "model: {model_type: llama, hidden_size: 256, num_hidden_layers: 4, num_attention_heads: 4}"
CHAT = "dataset: chats.jsonl"
SCALE = "elastic: {policy: scale_batch, reference_workers: 4"
WSD = "lr_scheduler_type: warmup_stable_decay\nlr_scheduler_kwargs: {"
AUTODROP = "lr_scheduler_type: autodrop\nlearning_rate: 0.05\nlr_scheduler_kwargs: {"
RAMP = "batch_schedule: {kind: ramp, max_global_batch_size: 256, ramp_samples: 100000"
NOISE = "batch_schedule: {kind: noise_scale, max_global_batch_size: 256"

JOB: dict[str, str] = {
    "model_name_or_path": "model_name_or_path: models/llama-8b",
    "model": MODEL,
    "task": "task: sequence_classification",
    "attn_implementation": "attn_implementation: sdpa",
    "tokenizer_name_or_path": "tokenizer_name_or_path: models/llama-8b",
    "lora": "lora: {r: 16, alpha: 32, target_modules: [q_proj, v_proj]}",
    "dataset": "dataset: corpus.jsonl",
    "dataset_format": f"{CHAT}\ndataset_format: chat",
    "dataset_text_field": "dataset: corpus.jsonl\ndataset_text_field: content",
    "dataset_label_field": "task: sequence_classification\ndataset_label_field: sentiment",
    "dataset_messages_field": f"{CHAT}\ndataset_messages_field: conversations",
    "dataset_prompt_field": "dataset_format: completion\ndataset_prompt_field: question",
    "dataset_completion_field": "dataset_format: completion\ndataset_completion_field: answer",
    "chat_template": f"{CHAT}\nchat_template: template.jinja",
    "packing": f"{CHAT}\npacking: documents",
    "block_size": "block_size: 2048",
    "max_bad_records": "max_bad_records: 20",
    "eval_fraction": "eval_fraction: 0.1",
    "eval_dataset": "dataset: corpus.jsonl\neval_dataset: held-out.jsonl",
    "dataset_cache_dir": "dataset_cache_dir: /scratch/tokens",
    "output_dir": "output_dir: runs/first",
    "backend": "backend: fsdp2",
    "deepspeed": "backend: deepspeed\ndeepspeed: {zero_optimization: {stage: 3}}",
    "workers": "workers: 2",
    "fsdp_replicas": "backend: fsdp2\nworkers: 4\nfsdp_replicas: 2",
    "fsdp_reshard_after_forward": "backend: fsdp2\nfsdp_reshard_after_forward: false",
    "fsdp_cpu_offload": "backend: fsdp2\nfsdp_cpu_offload: true",
    "bf16": "bf16: true",
    "activation_checkpointing": "activation_checkpointing: true",
    "per_device_train_batch_size": "per_device_train_batch_size: 4",
    "global_batch_size": "global_batch_size: 256",
    "batch_schedule": f"{RAMP}}}",
    "max_steps": "max_steps: 1000",
    "num_train_epochs": "num_train_epochs: 3",
    "optim": "optim: muon",
    "optim_args": "optim: lars\noptim_args: {trust: 0.002}",
    "param_groups": 'param_groups: [{match: "*.bias", weight_decay: 0}]',
    "averages": "averages: {ema: {decay: 0.999}}",
    "evaluate_average": "averages: {ema: {decay: 0.999}}\nevaluate_average: ema",
    "learning_rate": "learning_rate: 3e-4",
    "lr_scheduler_type": "lr_scheduler_type: cosine",
    "lr_scheduler_kwargs": f"{WSD}decay_ratio: 0.2}}",
    "warmup_ratio": "warmup_ratio: 0.03",
    "max_grad_norm": "max_grad_norm: 0.5",
    "weight_decay": "weight_decay: 0.1",
    "adam_beta1": "adam_beta1: 0.95",
    "adam_beta2": "adam_beta2: 0.95",
    "adam_epsilon": "adam_epsilon: 1e-6",
    "momentum": "optim: sgd\nmomentum: 0.9",
    "landscape": "landscape: {method: sam, rho: 0.05}",
    "landscape_space": "lora: {r: 16}\nlandscape: {method: flat_lora, sigma: 0.05}\nlandscape_space: merged",
    "seed": "seed: 1",
    "elastic": "elastic: {min_nodes: 2, max_nodes: 8}",
    "consensus": "consensus: {rule: mgrawa, replicas: 4, tau: 32, pull: 0.5}",
    "probes": "probes: {lambda_max: {every_steps: 100}}",
    "eval_steps": "eval_steps: 100",
    "eval_batches": "eval_batches: 50",
    "compute_metrics": "task: sequence_classification\ncompute_metrics: my_metrics:accuracy_per_class",
    "save_steps": "save_steps: 500",
    "save_total_limit": "save_total_limit: 3",
    "resume_from_checkpoint": "resume_from_checkpoint: none",
    "report_to": "report_to: [tensorboard]",
    "max_skipped_steps": "max_skipped_steps: 3",
    "on_divergence": "on_divergence: rewind\nsave_steps: 100",
    "rewind_lr_factor": "on_divergence: rewind\nsave_steps: 100\nrewind_lr_factor: 0.3",
    "max_rewinds": "on_divergence: rewind\nsave_steps: 100\nmax_rewinds: 1",
    "exit_code_when_stopped": "exit_code_when_stopped: 85",
    "export": "export: false",
}

LORA: dict[str, str] = {
    "r": "lora: {r: 16}",
    "alpha": "lora: {r: 16, alpha: 32}",
    "dropout": "lora: {dropout: 0.05}",
    "target_modules": "lora: {target_modules: [q_proj, v_proj]}",
    "use_rslora": "lora: {r: 64, use_rslora: true}",
    "modules_to_save": "lora: {modules_to_save: [lm_head]}",
    "base_dtype": "lora: {base_dtype: bf16}",
    "export": "lora: {export: both}",
}

RATE: dict[str, str] = {
    "decay_ratio": f"{WSD}decay_ratio: 0.2}}",
    "decay_type": f"{WSD}decay_type: linear}}",
    "min_lr_ratio": f"{WSD}min_lr_ratio: 0.1}}",
    "timescale_samples": "lr_scheduler_type: inverse_sqrt\nlr_scheduler_kwargs: {timescale_samples: 50000}",
    "window_samples": f"{AUTODROP}window_samples: 20000}}",
    "theta": f"{AUTODROP}theta: 0.1}}",
    "upper_theta": f"{AUTODROP}theta: 0.1, upper_theta: 2}}",
    "rho": f"{AUTODROP}rho: 0.1}}",
    "lower_lr": f"{AUTODROP}lower_lr: 1e-6}}",
    "extra_windows": f"{AUTODROP}extra_windows: 5}}",
}

BATCH: dict[str, str] = {
    "kind": "batch_schedule: {kind: constant}",
    "steps": "batch_schedule: {kind: steps, steps: [{at: 0.5, global_batch_size: 64}]}",
    "min_global_batch_size": "batch_schedule: {kind: ramp, min_global_batch_size: 8, ramp_samples: 100000}",
    "max_global_batch_size": f"{NOISE}}}",
    "ramp_samples": f"{RAMP}}}",
    "multiple": f"{NOISE}, multiple: 0.5}}",
    "every_samples": f"{NOISE}, every_samples: 20000}}",
    "horizon_samples": f"{NOISE}, horizon_samples: 50000}}",
    "hysteresis": f"{NOISE}, hysteresis: 1.5}}",
    "growth": f"{NOISE}, growth: 4}}",
    "may_shrink": f"{NOISE}, may_shrink: true}}",
    "lr_rule": f"{RAMP}, lr_rule: none}}",
}

ELASTIC: dict[str, str] = {
    "min_nodes": "elastic: {min_nodes: 2}",
    "max_nodes": "elastic: {max_nodes: 8}",
    "policy": f"{SCALE}}}",
    "reference_workers": f"{SCALE}}}",
    "lr_rule": f"{SCALE}, lr_rule: linear}}",
    "ramp_samples": f"{SCALE}, ramp_samples: 4096}}",
    "min_global_batch_size": f"{SCALE}, min_global_batch_size: 16}}",
    "max_global_batch_size": f"{SCALE}, max_global_batch_size: 128}}",
    "min_learning_rate": f"{SCALE}, min_learning_rate: 1e-5}}",
    "max_learning_rate": f"{SCALE}, max_learning_rate: 1e-3}}",
    "max_accumulation": "elastic: {max_accumulation: 16}",
    "mirror_every": "elastic: {mirror_every: 10}",
    "copies": "elastic: {copies: 2}",
    "mirror_gib": "elastic: {mirror_gib: 16}",
    "lease_s": "elastic: {lease_s: 5}",
    "hang_timeout_s": "elastic: {hang_timeout_s: 120}",
    "join_debounce_s": "elastic: {join_debounce_s: 2}",
    "drain_timeout_s": "elastic: {drain_timeout_s: 60}",
    "join_timeout_s": "elastic: {join_timeout_s: 1800}",
    "endpoint": "elastic: {endpoint: node-1:29400}",
    "address": "elastic: {endpoint: node-1:29400, address: 10.0.0.1}",
    "secret_file": "elastic: {endpoint: node-1:29400, secret_file: /shared/secret}",
    "witness": "elastic: {max_nodes: 2, witness: etcd://host:2379}",
    "preemption_notice_file": "elastic: {preemption_notice_file: /tmp/preempted}",
    "event_log": "elastic: {event_log: true}",
    "respawn": "elastic: {respawn: false}",
    "max_respawns": "elastic: {max_respawns: 10}",
}

CONSENSUS: dict[str, str] = {
    "rule": "consensus: {rule: mgrawa, replicas: 4, tau: 32}",
    "replicas": "consensus: {rule: local_sgd, replicas: 4, tau: 32}",
    "exchange": "consensus: {rule: diloco, replicas: 4, exchange: {bits: 4}}",
    "exchange_timeout_s": "consensus: {rule: local_sgd, replicas: 4, exchange_timeout_s: 120}",
    "steps": "consensus: {rule: local_sgd, replicas: 4, steps: by_speed}",
    "disagreement_span": "consensus: {rule: local_sgd, replicas: 4, disagreement_span: 8}",
}

PROBE: dict[str, str] = {
    "measure": "probes: {first_layer: {measure: trace, every_steps: 100, parameters: model.layers.0.*}}",
    "every_steps": "probes: {lambda_max: {every_steps: 100}}",
    "every_samples": "probes: {lambda_max: {every_samples: 50000}}",
    "budget": "probes: {trace: {every_steps: 100, budget: 0.05}}",
    "units": "probes: {trace: {every_steps: 100, units: 8}}",
    "products": "probes: {lambda_max: {every_steps: 100, products: blockwise}}",
}

STUDY: dict[str, str] = {
    "dataset": "dataset: digits",
    "eval_fraction": "eval_fraction: 0.8",
    "output_dir": "output_dir: runs/study",
    "grid": "grid: {width: [32, 96], depth: [1, 2], momentum: [0.3, 0.7]}",
    "stop_loss": "stop_loss: 0.01",
    "max_epochs": "max_epochs: 600",
    "measures": "measures: [lpf_normalised, lambda_max]",
    "bootstrap_draws": "bootstrap_draws: 2000",
    "confidence": "confidence: 0.9",
    "seed": "seed: 1",
    "workers": "workers: 8",
    "timeout_s": "timeout_s: 600",
}

GRID: dict[str, str] = {
    "width": "grid: {width: [32, 96]}",
    "depth": "grid: {depth: [1, 2]}",
    "batch_size": "grid: {batch_size: [16, 32]}",
    "learning_rate": "grid: {learning_rate: [0.1, 0.2]}",
    "weight_decay": "grid: {weight_decay: [0, 1e-4]}",
    "momentum": "grid: {momentum: [0.3, 0.7]}",
    "label_noise": "grid: {label_noise: [0, 0.1]}",
    "seed": "grid: {seed: [0, 1, 2]}",
}

COMPARE: dict[str, str] = {
    "job": "job: {model: {model_type: llama, hidden_size: 64}, dataset: python-stdlib, max_steps: 200}",
    "methods": "methods: {adamw: {}, sam: {landscape: {method: sam}, grid: {landscape.rho: [0.02, 0.05, 0.1]}}}",
    "axes": "axes: {global_batch_size: [32, 128]}",
    "seeds": "seeds: [0, 1, 2]",
    "tuning_seed": "tuning_seed: 77",
    "equal": "equal: [epochs, gradient_evaluations]",
    "target_loss": "target_loss: 2.5",
    "measures": "measures: [lambda_max, lpf]",
    "units": "units: 8",
    "output_dir": "output_dir: runs/compare",
    "confidence": "confidence: 0.9",
    "workers": "workers: 8",
    "timeout_s": "timeout_s: 1200",
}

BESIDE = {
    "flat_lora": ("lora: {r: 16}", "landscape_space: merged"),
    "nbar": ("lora: {r: 16}",),
    "bi_lora": ("lora: {r: 16}",),
    "momentum_sam": ("optim: sgd", "momentum: 0.9"),
    "sampa": ("optim: sgd", "momentum: 0.9"),
    "eamsgd": ("optim: sgd", "momentum: 0.99", "optim_args: {nesterov: true}"),
    "lsam": ("landscape: {method: sam, rho: 0.05}",),
    "parle": ("landscape: {method: entropy_sgd, inner_steps: 25}",),
    "muloco": ("optim: muon",),
}
"""What an algorithm's own example needs beside it."""
EXCHANGE: dict[str, dict[str, object]] = {
    "sparseloco": {"exchange": {"top_k": 64, "bits": 2}}, "streaming_diloco": {"exchange": {"bits": 4}},
}  # fmt: skip
"""How the exchanges of a rule of consensus travel, where its paper says so."""
