"""A recipe of the tiny model, as ``ldlm fit`` reads it."""

RECIPE = {
    "sequence_length": 8,
    "tokenizer": "./encoder",
    "data": {"dataset": "text.txt", "batch_size": 4, "validation": 0.2, "cache_dir": "cache", "validation_rows": 8},
    "model": {
        "token_encoder": {"class_path": "PretrainedTokenEncoder", "init_args": {"model": "./encoder"}},
        "latent_encoder": {
            "class_path": "PerceiverResamplerEncoder",
            "init_args": {"hidden_size": 16, "latent_size": 12, "width": 16, "layers": 1, "heads": 2},
        },
        "latent_decoder": {
            "class_path": "PerceiverResamplerDecoder",
            "init_args": {"hidden_size": 16, "latent_size": 12, "width": 16, "layers": 1, "heads": 2},
        },
        "denoiser": {
            "class_path": "DiT",
            "init_args": {"latent_size": 12, "width": 16, "layers": 1, "heads": 2},
        },
        "token_decoder": {"class_path": "LinearTokenDecoder", "init_args": {"hidden_size": 16, "vocab_size": 40}},
    },
    "training": {"warmup_steps": 2, "timestep_refresh": 1, "statistics_rows": 8},
    "trainer": {
        "max_steps": 3,
        "accelerator": "cpu",
        "devices": 1,
        "num_sanity_val_steps": 0,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "log_every_n_steps": 1,
        "logger": {"class_path": "TensorBoardLogger", "init_args": {"save_dir": "runs", "name": "tiny"}},
        "callbacks": [
            {"class_path": "EMA"},
            {"class_path": "ShowSamples", "init_args": {"num_samples": 2, "nfe": 2}},
            {"class_path": "SaveAtEnd"},
            {
                "class_path": "ModelCheckpoint",
                "init_args": {
                    "every_n_train_steps": 2,
                    "save_last": True,
                    "save_top_k": 1,
                    "monitor": "step",
                    "mode": "max",
                },
            },
        ],
    },
}
