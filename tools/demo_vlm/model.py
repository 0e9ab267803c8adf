"""LLaVA's architecture in small: a ViT, a two-layer MLP projector, a Llama decoder."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from csp_edge.eval.scenes import N_PIXELS

N_PIXELS_PATCH = 12
N_GRID = N_PIXELS // N_PIXELS_PATCH
N_PATCHES = N_GRID**2  # tokens a picture

HEAD_DIM = 64
VISION = {"n_embd": 192, "n_layer": 5, "n_ff": 768}
TEXT = {"n_embd": 256, "n_layer": 6, "n_head": 4, "n_head_kv": 2, "n_ff": 768}
ROPE_BASE = 10000.0
N_CTX = 4096
NORM_EPS = 1e-5


class VisionBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        n_embd, n_ff = VISION["n_embd"], VISION["n_ff"]
        self.ln1, self.ln2 = (nn.LayerNorm(n_embd, eps=NORM_EPS) for _ in range(2))
        self.qkv = nn.Linear(n_embd, 3 * n_embd)
        self.out = nn.Linear(n_embd, n_embd)
        self.up = nn.Linear(n_embd, n_ff)
        self.down = nn.Linear(n_ff, n_embd)

    def forward(self, x: Tensor) -> Tensor:
        n, t, _ = x.shape
        q, k, v = self.qkv(self.ln1(x)).view(n, t, 3, -1, HEAD_DIM).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v)
        x = x + self.out(attended.transpose(1, 2).reshape(n, t, -1))
        return x + self.down(F.gelu(self.up(self.ln2(x)), approximate="tanh"))


class Vision(nn.Module):
    """Pictures [n, N_PIXELS, N_PIXELS, 3] in [-1, 1] to features [n, N_PATCHES, n_embd]."""

    def __init__(self) -> None:
        super().__init__()
        n_embd = VISION["n_embd"]
        self.patch = nn.Linear(3 * N_PIXELS_PATCH**2, n_embd, bias=False)
        self.position = nn.Parameter(0.02 * torch.randn(N_PATCHES, n_embd))
        self.pre = nn.LayerNorm(n_embd, eps=NORM_EPS)
        self.blocks = nn.ModuleList(VisionBlock() for _ in range(VISION["n_layer"]))
        self.post = nn.LayerNorm(n_embd, eps=NORM_EPS)

    def forward(self, pictures: Tensor) -> Tensor:
        n = len(pictures)
        x = pictures.view(n, N_GRID, N_PIXELS_PATCH, N_GRID, N_PIXELS_PATCH, 3)
        x = self.patch(x.permute(0, 1, 3, 2, 4, 5).reshape(n, N_PATCHES, -1))
        x = self.pre(x + self.position)
        for block in self.blocks:
            x = block(x)
        return self.post(x)


class RMSNorm(nn.Module):
    def __init__(self, n_embd: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(n_embd))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), x.shape[-1:], self.weight, NORM_EPS)


class TextBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        n_embd, n_ff = TEXT["n_embd"], TEXT["n_ff"]
        n_q, n_kv = TEXT["n_head"] * HEAD_DIM, TEXT["n_head_kv"] * HEAD_DIM
        self.n1, self.n2 = RMSNorm(n_embd), RMSNorm(n_embd)
        self.q = nn.Linear(n_embd, n_q, bias=False)
        self.k = nn.Linear(n_embd, n_kv, bias=False)
        self.v = nn.Linear(n_embd, n_kv, bias=False)
        self.out = nn.Linear(n_q, n_embd, bias=False)
        self.gate = nn.Linear(n_embd, n_ff, bias=False)
        self.up = nn.Linear(n_embd, n_ff, bias=False)
        self.down = nn.Linear(n_ff, n_embd, bias=False)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
        n, t, _ = x.shape
        y = self.n1(x)
        q, k, v = (f(y).view(n, t, -1, HEAD_DIM).transpose(1, 2) for f in (self.q, self.k, self.v))
        n_group = TEXT["n_head"] // TEXT["n_head_kv"]
        k, v = (z.repeat_interleave(n_group, 1) for z in (rotate(k, *rope), v))
        attended = F.scaled_dot_product_attention(rotate(q, *rope), k, v, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).reshape(n, t, -1))
        y = self.n2(x)
        return x + self.down(F.silu(self.gate(y)) * self.up(y))

    def look(self, x: Tensor, rope: tuple[Tensor, Tensor], rows: Tensor) -> Tensor:
        """Log attention of the first head, of the tokens `rows` of one conversation x [t, n_embd].

        [len(rows), t]
        """
        y = self.n1(x)
        q = F.linear(y[rows], self.q.weight[:HEAD_DIM])
        k = F.linear(y, self.k.weight[:HEAD_DIM])
        q = rotate(q, *(part[rows] for part in rope))
        logits = (q @ rotate(k, *rope).T).float() / HEAD_DIM**0.5
        later = torch.arange(len(x), device=x.device)[None] > rows[:, None]
        return logits.masked_fill(later, -torch.inf).log_softmax(-1)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """RoPE on neighbouring pairs, as llama.cpp's llama architecture has it."""
    even, odd = x[..., 0::2], x[..., 1::2]
    rotated = torch.stack([even * cos - odd * sin, even * sin + odd * cos], -1)
    return rotated.flatten(-2).to(x.dtype)


class DemoVLM(nn.Module):
    def __init__(self, n_vocab: int) -> None:
        super().__init__()
        n_embd = TEXT["n_embd"]
        self.vision = Vision()
        self.mm0 = nn.Linear(VISION["n_embd"], n_embd)
        self.mm2 = nn.Linear(n_embd, n_embd)
        self.embedding = nn.Embedding(n_vocab, n_embd)
        nn.init.normal_(self.embedding.weight, std=0.02)
        self.blocks = nn.ModuleList(TextBlock() for _ in range(TEXT["n_layer"]))
        self.norm = RMSNorm(n_embd)
        self.output = nn.Linear(n_embd, n_vocab, bias=False)
        angles = torch.arange(N_CTX)[:, None] * ROPE_BASE ** (
            -torch.arange(0, HEAD_DIM, 2) / HEAD_DIM
        )
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)

    def project(self, features: Tensor) -> Tensor:
        """Of pictures [n, N_PATCHES, -1], as tokens."""
        return self.mm2(F.gelu(self.mm0(features), approximate="tanh"))

    def forward(
        self, tokens: Tensor, is_picture: Tensor, features: Tensor
    ) -> tuple[Tensor, list[Tensor]]:
        """The last hidden state, and those before each block, [n, t, n_embd].

        tokens, is_picture: [n, t]; features: of all pictures in order, [n_pictures, N_PATCHES, -1].
        """
        pictures = self.project(features)
        x = self.embedding(tokens).masked_scatter(
            is_picture[..., None], pictures.float().reshape(-1, pictures.shape[-1])
        )
        t = tokens.shape[1]
        rope = self.cos[:t], self.sin[:t]
        before = []
        for block in self.blocks:
            before.append(x)
            x = block(x, rope)
        return self.norm(x), before
