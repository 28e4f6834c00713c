"""What a client may ask: OpenAI's fields, those that other servers added to them, and ours under `bem`.

A field that is not known is refused, and so is one that is known and cannot be done: an answer that silently
ignores what was asked is worse than none. Fields that only describe the caller are taken and not used.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

SEEDS = 1 << 63
TokenId = Annotated[int, Field(ge=0)]
Text = Annotated[str, Field(max_length=4 << 20)]
Stop = Annotated[str, Field(min_length=1, max_length=512)]


def _listed(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


def _absent(value: Any) -> Any:
    """OpenAI's clients send null for what they leave out."""
    return [] if value is None else value


Stops = Annotated[
    list[Stop], Field(max_length=16), BeforeValidator(_listed), BeforeValidator(_absent)
]


class Part(BaseModel):
    """A part of a request; an unknown field is refused."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)


class BemFields(Part):
    """What only this server knows."""

    route: str | None = None
    """Expert that answers, instead of the router's choice; "base": none."""
    strength: float | None = Field(default=None, ge=0, le=4)
    """Factor on what the experts do in every chunk, within the trust region; 1: as trained."""
    evidence: list[Text] | None = Field(default=None, max_length=64)
    """Passages that the answer is to rest on; the best of them are shown."""
    retrieve: bool = False
    """Look for evidence in the server's index."""
    kappa: float | None = Field(default=None, ge=0, le=1)
    """Raises the safety knob for this answer; less than its level changes nothing."""
    conversation: str | None = Field(default=None, max_length=256)
    """Keeps a conversation on one version while a canary runs; default: how it began."""
    timeout_s: float | None = Field(default=None, gt=0)
    """From the request to the last token; at most what the server allows."""


class StreamOptions(Part):
    include_usage: bool | None = False
    include_obfuscation: bool | None = None


class Structure(Part):
    """The form of an answer, as vLLM's `structured_outputs` says it: one of them."""

    json_: dict[str, Any] | str | None = Field(None, alias="json")
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None
    """In Lark's syntax."""


class JsonSchema(Part):
    name: str = ""
    description: str | None = None
    schema_: dict[str, Any] = Field(default_factory=dict, alias="schema")
    strict: bool | None = None


class ResponseFormat(Part):
    """The form of an answer, as OpenAI says it."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class Asked(Part):
    """What both kinds of requests have in common."""

    model: str = Field("bem", max_length=256)
    temperature: float | None = Field(1.0, ge=0, le=2)
    top_p: float | None = Field(1.0, gt=0, le=1)
    n: int | None = Field(1, ge=1, le=128)
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    stop: Stops = []
    presence_penalty: float | None = Field(0.0, ge=-2, le=2)
    frequency_penalty: float | None = Field(0.0, ge=-2, le=2)
    logit_bias: dict[TokenId, Annotated[float, Field(ge=-100, le=100)]] | None = Field(
        None, max_length=1024
    )
    seed: Annotated[int, Field(ge=-SEEDS, lt=SEEDS)] | None = None
    user: str | None = Field(None, max_length=512)
    # as vLLM has them
    top_k: int | None = Field(0, ge=-1)
    min_p: float | None = Field(0.0, ge=0, le=1)
    repetition_penalty: float | None = Field(1.0, gt=0, le=10)
    ignore_eos: bool | None = False
    stop_token_ids: list[TokenId] | None = Field(None, max_length=64)
    structured_outputs: Structure | None = None
    bem: BemFields = Field(default_factory=BemFields)


class CompletionRequest(Asked):
    """`POST /v1/completions`."""

    prompt: (
        Text
        | Annotated[list[Text], Field(min_length=1)]
        | Annotated[list[TokenId], Field(min_length=1)]
        | Annotated[list[Annotated[list[TokenId], Field(min_length=1)]], Field(min_length=1)]
    )
    max_tokens: int | None = Field(16, ge=0)
    """0, with echo: the prompt is only scored."""
    logprobs: int | None = Field(None, ge=0, le=20)
    echo: bool | None = False
    best_of: int | None = Field(None, ge=1)
    suffix: str | None = None


class ContentPart(Part):
    type: Literal["text"]
    text: Text


class ImageUrl(Part):
    url: Annotated[str, Field(max_length=32 << 20)]
    detail: Literal["auto", "low", "high"] | None = None


class ImagePart(Part):
    type: Literal["image_url"]
    image_url: ImageUrl


class CalledFunction(Part):
    name: str = Field(max_length=256)
    arguments: Text
    """JSON."""


class ToolCall(Part):
    id: str = Field(max_length=256)
    type: Literal["function"] = "function"
    function: CalledFunction


class Message(Part):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Text | list[ContentPart | ImagePart] | None = None
    name: str | None = None
    refusal: str | None = None
    tool_calls: list[ToolCall] | None = Field(None, max_length=128)
    """assistant: what it called."""
    tool_call_id: str | None = Field(None, max_length=256)
    """tool: the call whose result this is."""
    # what OpenAI's client writes into an answer that has none of it, and sends back
    annotations: None = None
    audio: None = None
    function_call: None = None

    @property
    def text(self) -> str:
        """All that it says."""
        if isinstance(self.content, list):
            return "".join(part.text for part in self.content if isinstance(part, ContentPart))
        return self.content or ""

    @property
    def images(self) -> list[str]:
        """URLs of its pictures."""
        parts = self.content if isinstance(self.content, list) else []
        return [part.image_url.url for part in parts if isinstance(part, ImagePart)]


class Function(Part):
    name: str = Field(pattern=r"^[A-Za-z0-9_.-]{1,128}$")
    description: Text | None = None
    parameters: dict[str, Any] | None = None
    """JSON schema of its arguments; None: it takes none."""
    strict: bool | None = None


class Tool(Part):
    type: Literal["function"]
    function: Function


class FunctionName(Part):
    name: str = Field(max_length=128)


class NamedTool(Part):
    type: Literal["function"]
    function: FunctionName


class ChatRequest(Asked):
    """`POST /v1/chat/completions`."""

    messages: list[Message] = Field(min_length=1, max_length=4096)
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool | None = False
    top_logprobs: int | None = Field(None, ge=0, le=20)
    response_format: ResponseFormat | None = None
    tools: list[Tool] | None = Field(None, max_length=128)
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None
    # who asks and how it is billed: taken, not used
    metadata: dict[str, str] | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    service_tier: Literal["auto", "default"] | None = None
    store: Literal[False] | None = None


Request = CompletionRequest | ChatRequest
