"""coterie in Transformers: importing this registers the experts implementation and the quantizer."""

from coterie.hf.config import CoterieConfig
from coterie.hf.experts import experts_forward
from coterie.hf.loading import from_pretrained
from coterie.hf.quantizer import CoterieQuantizer
from coterie.hf.weight import packed_parameters

__all__ = ["CoterieConfig", "CoterieQuantizer", "experts_forward", "from_pretrained", "packed_parameters"]
