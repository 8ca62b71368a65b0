"""What keys of other programs are called here: what to write -> the names that people type for it.

A name may have its sections in front: of `training.progressive.trunk_strategy` the longest ending that stands here
counts. Small letters, words joined by underscores. An answer ends the sentence "unknown key ...; write ...".
"""

_MODEL = {
    "model.architecture.n_stacks and model.architecture.blocks_per_stack": "n_blocks num_blocks",
    "model.architecture.n_stacks and model.architecture.blocks_per_stack; their product is the number of layers": (
        "num_layers num_hidden_layers n_layers n_layer layers depth"
    ),
    "model.architecture.n_stacks": "num_stacks",
    "model.d_model": "hidden_size hidden_dim n_embd embed_dim embedding_dim embedding_size d_embed dim width",
    "model.n_heads": "num_heads num_attention_heads n_head heads",
    "model.n_heads, which times the head's width is model.d_model": "head_dim",
    "model.n_kv_heads": "num_key_value_heads num_kv_heads n_kv_head",
    "model.d_ff": "intermediate_size ffn_dim ffn_hidden_size dim_feedforward mlp_dim n_inner d_mlp",
    "model.d_ff, the width itself": "mlp_ratio",
    "model.norm_eps": "rms_norm_eps layer_norm_eps layer_norm_epsilon",
    "model.rope_theta": "rope_base rotary_base",
    "model.use_rope true or false": "rope",
    "model.rope_theta; positions are not scaled otherwise": "rope_scaling",
    "model.init_std": "initializer_range",
    "model.tie_embeddings true or false": "tie_word_embeddings tie_weights",
    "model.dropout, or curriculum.adapters.dropout for adapters": "dropout",
    "model.dropout": (
        "attention_dropout hidden_dropout hidden_dropout_prob attention_probs_dropout_prob resid_dropout "
        "attn_pdrop resid_pdrop embd_pdrop dropout_rate"
    ),
    "model.attention_preset or model.attention_type": "attention",
    "model.attention_implementation (auto, reference, chunked, cudnn or pallas)": "attn_implementation",
    "model.attention_implementation auto, which picks the quickest kernel": "flash_attention use_flash_attention",
    "model.attention_mode causal or bidirectional": "causal bidirectional",
    "model.mla.rq": "mla_rq r_q q_lora_rank",
    "model.mla.rkv": "mla_rkv r_kv kv_lora_rank",
    "model.mla.nope_dim": "qk_nope_head_dim",
    "model.mla.rope_dim": "qk_rope_head_dim",
    "model.mla.v_dim": "v_head_dim",
    "model.kernel.type": "kernel_type",
    "model.kernel.features": "kernel_dim",
    "model.attention_preset custom with model.attention_type, model.attention_mode and model.kernel.type": (
        "attention_custom"
    ),
    "nothing: curriculum.plan says which stacks learn; under plan custom, curriculum.phases": "freeze_blocks",
    "model.vocab_size, or tokenizer.vocab_size for a tokenizer that is trained": "vocab_size",
    "the sizes in the section model; --dry-run counts the parameters": "num_parameters",
}
_PRECISION = {
    "model.compute_dtype (fp32, bf16 or fp16) and model.param_dtype (fp32 or bf16)": (
        "dtype torch_dtype precision mixed_precision amp"
    ),
    "model.compute_dtype bf16": "bf16",
    "model.compute_dtype fp16": "fp16",
    "model.compute_dtype fp32": "fp32 tf32",
    "model.compute_dtype bf16 or fp16": "half",
    "model.compute_dtype and model.param_dtype for stacks that learn, curriculum.frozen for those that do not": (
        "new_stack_precision"
    ),
    "curriculum.frozen (fp32, bf16, fp16, int8, fp8, nf4 or nvfp4), the format of weights that do not learn": (
        "trunk_precision quantization quantize quantization_enabled quantization_type quantization_config"
    ),
    "curriculum.frozen nf4 or nvfp4": "load_in_4bit bnb_4bit_quant_type",
    "curriculum.frozen int8 or fp8": "load_in_8bit",
    "model.compute_dtype (fp32, bf16 or fp16)": "bnb_4bit_compute_dtype",
    "curriculum.frozen nvfp4": "nvfp4",
    "curriculum.frozen nf4": "nf4",
    "model.remat true or false": "gradient_checkpointing activation_checkpointing",
    "memory.offload (none, trunk, trunk+optimizer or all)": "cpu_offload",
    "memory.offload trunk+optimizer": "offload_optimizer",
}
_DATA = {
    "data.seq_len": (
        "context_length context_size context_window ctx_len n_ctx n_positions max_length max_len max_seq_len "
        "max_seq_length seq_length sequence_length max_position_embeddings model.block_size data.block_size"
    ),
    "data.seq_len for the length of sequences, or curriculum.block_size under plan blockwise": "block_size",
    "curriculum.block_size under plan blockwise": "training.block_size",
    "data.source text or jsonl, and data.path, a file or a folder": "dataset datasets dataset_name",
    "data.path, with data.source text or jsonl": "dataset_path data_path data_dir train_file train_path",
    "data.valid_path": "validation_file val_path eval_dataset",
    "data.valid_fraction": "val_fraction validation_split",
    "data.text_key": "text_column text_field",
    "data.batch_size, sequences per step over all devices": "batch_size train_batch_size",
    "data.batch_size, sequences per step over all devices and microbatches": "per_device_train_batch_size",
    "data.batch_size, which evaluation shares": "per_device_eval_batch_size eval_batch_size",
    "data.batch_size over all microbatches, and optimizer.microbatches": "micro_batch_size",
    "data.batch_size": "global_batch_size",
    "optimizer.microbatches; data.batch_size is cut into so many parts": (
        "gradient_accumulation_steps gradient_accumulation accumulate_grad_batches grad_accum_steps"
    ),
    "nothing: a thread reads ahead by itself": "num_workers",
    "data.source synthetic": "use_dummy_data",
    "data.synthetic_tokens under data.source synthetic": "num_samples",
    "data.packing pack or chunk": "padding",
    "tokenizer.kind file and tokenizer.path, a SentencePiece .model": "tokenizer_name tokenizer_path",
    "tokenizer.kind (bytes, sentencepiece or file)": "tokenizer_embedding",
    "tokenizer.kind (bytes, sentencepiece or file); embeddings are trained with the model": "embedding_option",
    "run.init_from, a run directory whose weights are taken, or the sizes in section model": (
        "model_name model_name_or_path"
    ),
    "run.init_from, a run directory whose weights are taken": "pretrained",
    "the sizes in section model; configs/ has examples": "model_family family",
    "nothing: the tokenizer has its mask token": "mask_token_id special_mask_id",
}
_OPTIMIZER = {
    "optimizer.lr": "learning_rate max_lr peak_lr",
    "optimizer.lr, or curriculum.adapters.lr for adapters": "lr",
    "optimizer.lr, or lr in the entries of curriculum.stages": "current_block_lr",
    "optimizer.final_lr, as a share of optimizer.lr": "min_lr",
    "optimizer.weight_decay": "weight_decay wd",
    "optimizer.b1 and optimizer.b2, one number each": "betas adam_betas",
    "optimizer.b1": "beta1 adam_beta1",
    "optimizer.b2": "beta2 adam_beta2",
    "optimizer.b1, which is the momentum of sgd and muon": "momentum",
    "optimizer.eps": "adam_epsilon epsilon",
    "optimizer.name (adamw, sgd, lion, adafactor, muon or adamw8bit)": "optimizer_type optim optimizer.type",
    "optimizer.schedule (constant, cosine, linear or wsd)": "lr_scheduler_type lr_scheduler scheduler lr_schedule",
    "optimizer.warmup, a share of the phase such as 0.05": "warmup_steps num_warmup_steps warmup_ratio warmup_iters",
    "optimizer.decay, a share of the phase such as 0.3, under schedule wsd": "decay_steps",
    "optimizer.grad_clip": "max_grad_norm gradient_clip_val gradient_clipping clip_grad_norm",
}
_LENGTH = {
    "curriculum.steps or curriculum.budget; a length is given in steps, tokens or FLOPs, not in epochs": (
        "epochs num_epochs num_train_epochs max_epochs"
    ),
    "curriculum.steps, the steps of each phase; a length is given in steps, not in epochs": "epochs_per_stack",
    "curriculum.steps": "steps_per_stack",
    'curriculum.steps, the steps of each phase, or curriculum.budget such as "3000 steps" or "5M tokens" for all': (
        "max_steps num_steps total_steps train_steps num_train_steps max_iters iterations"
    ),
    'curriculum.budget such as "5M tokens"; run.sample_tokens for the sample at the end': "max_tokens",
    'curriculum.budget such as "2e15 flops"': "target_flops",
}
_RUN = {  # and devices
    "run.seed": "seed random_seed",
    "run.dir": "output_dir out_dir save_dir checkpoint_dir log_dir logging_dir",
    "run.name": "run_id run_name experiment_name exp_name",
    "run.log_every": "logging_steps log_interval log_every_n_steps",
    "run.save_every": "save_steps save_interval checkpoint_every",
    "run.keep": "save_total_limit",
    "nothing: each stack is saved apart in every run; run.keep_depths says which depths stay loadable": (
        "save_stacks save_rack"
    ),
    "run.eval_every": "eval_steps eval_interval val_check_interval",
    "run.eval_batches": "eval_iters",
    "nothing: the same command again continues a run; run.init_from starts from another one": (
        "resume_from_checkpoint resume_from"
    ),
    "run.init_from, a run directory whose weights are taken": "checkpoint",
    "run.init_from for weights, or curriculum.adapters.load_from for adapters": "load_from",
    "run.tensorboard true or false; metrics.jsonl in the run directory holds all values": (
        "report_to wandb use_wandb wandb_project"
    ),
    "run.name; there is no wandb, run.tensorboard writes curves": "wandb_run_name",
    "run.sample_prompt": "prompt",
    "memory.device for the memory to fit into; all devices that JAX sees are used": "device",
    "mesh.data and mesh.fsdp; all devices that JAX sees are used (JAX_PLATFORMS=cpu hides the others)": (
        "devices gpus n_gpus num_gpus accelerator"
    ),
    "mesh.num_processes": "world_size num_nodes",
    "mesh.process_id": "local_rank",
    "mesh.coordinator, host:port of process 0": "master_addr master_port",
    "mesh.fsdp": "strategy.fsdp",
    "mesh.fsdp, the devices that share each weight": "tensor_parallel",
    "mesh.data": "data_parallel",
    "mesh.fsdp and memory.offload": "deepspeed",
}
_ADAPTER_NAMES = {
    "curriculum.trunk adapt, and the keys of curriculum.adapters": (
        "lora use_lora peft use_peft qlora qlora_enabled qlora.enabled progressive_qlora"
    ),
    "curriculum.adapters.rank": "lora_r lora_rank qlora_rank qlora.rank",
    "curriculum.adapters.alpha": "lora_alpha qlora_alpha qlora.alpha",
    "curriculum.adapters.dropout": "lora_dropout qlora_dropout qlora.dropout",
    "curriculum.adapters.targets, a list of q, k, v, o, gate, up and down": "lora_target_modules target_modules",
    "curriculum.adapters.lr": "lora_lr qlora_lr qlora.lr",
    "curriculum.adapters.strategy (simplified, progressive or variable)": "qlora_strategy qlora.strategy",
    "curriculum.adapters.rank_pattern": "qlora_rank_pattern qlora.rank_pattern",
    "curriculum.adapters.alpha_pattern": "qlora_alpha_pattern qlora.alpha_pattern",
    "curriculum.adapters.table under strategy variable": "qlora_configs",
    "model.compute_dtype (fp32, bf16 or fp16) and model.param_dtype (fp32 or bf16)": (
        "qlora_mixed_precision qlora.mixed_precision"
    ),
    "curriculum.adapters.trunk_rank": "progressive_qlora_rank",
    "curriculum.adapters.trunk_alpha": "progressive_qlora_alpha",
}
_STACKWISE = {  # the PyTorch system
    "curriculum.plan (layerwise, blockwise, stackwise or rackwise)": "training_architecture",
    "curriculum.plan (rackwise, stackwise, layerwise, blockwise, append, prepend, grow, fusion, ...)": (
        "training.mode training.strategy training_mode training_strategy strategy"
    ),
    "curriculum.plan rackwise": "end_to_end",
    "curriculum.plan stackwise or rackwise": "end_to_end_scope",
    "curriculum.plan append (left to right) or prepend (right to left)": (
        "progressive progressive.enabled building_mode"
    ),
    "model.architecture.n_stacks": "progressive.max_stacks max_stacks target_stacks progressive.target_stacks",
    "curriculum.trunk (frozen or adapt); qlora is adapt": "trunk_strategy",
    "curriculum.trunk (frozen or adapt)": "trunk freeze_trunk",
    "cache.kind (auto, host, disk or recompute); auto caches the activations of the frozen prefix": (
        "cache_activations activation_cache"
    ),
    "cache.kind (auto, host, disk or recompute)": "cache_mode",
    "cache.dir": "cache_dir",
    "curriculum.plan fusion, and curriculum.learn, the stacks that learn": "fusion",
    "curriculum.plan fusion, and curriculum.trunk (frozen or adapt)": "fusion_mode",
    "a last entry {plan: joint, steps: N} in curriculum.plans": "joint_tuning_steps",
    "objective.kind (clm, mlm or diffusion) with run.init_from": "fine_tune_mode",
    "objective.kind (clm, mlm or diffusion)": "training_objective objective_type training.objective",
    "objective.time (none, depth or input)": "time_interpretation time_step_masking progressive_masking",
    "objective.time depth": "time_as_depth depth_time",
    "objective.time input": "use_time_as_input",
    "model.time_embedding (sinusoidal or learned) under objective.time input": "time_encoding_type",
    "objective.time (none, depth or input) and objective.levels, the share that is hidden at each stack": (
        "num_time_steps time_per_stack"
    ),
    "objective.levels, the share that is hidden at each stack, under objective.time depth": (
        "time_step_mask_fractions"
    ),
    "objective.min_fraction": "mask_fraction_min min_mask_fraction",
    "objective.max_fraction": "mask_fraction_max max_mask_fraction",
    "objective.schedule (linear, cosine or exponential)": "mask_schedule_type mask_schedule",
    "objective.min_fraction and objective.max_fraction; objective.mask_fraction under objective.kind mlm": (
        "mask_probability mask_ratio mask_prob"
    ),
    "objective.mask_fraction": "mlm_probability",
    "curriculum.overlap, the earlier stacks that learn on": "gradual_unfreezing",
    "curriculum.consistency under plan prepend": "consistency_loss",
    "the sections curriculum (plan and steps), optimizer, objective, cache and run": "training",
}
_OPTIONS = {  # of options of commands
    "--config FILE, which may be repeated; later files win": (
        "config_name config_path config_dir config_file config conf cfg yaml cn cp cd c f"
    ),
    "a loop over this command in the shell; one command trains one run": "multirun m sweep",
    "nothing: the same command again continues a run; run.resume never refuses to": "resume",
    "run.log_every 1": "verbose",
    "run.dir": "o",
}

_ALL = (_MODEL, _PRECISION, _DATA, _OPTIMIZER, _LENGTH, _RUN, _ADAPTER_NAMES, _STACKWISE, _OPTIONS)
SYNONYMS = {name: answer for part in _ALL for answer, names in part.items() for name in names.split()}
