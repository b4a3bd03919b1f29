"""Whether an answer says that there is nothing of what was asked for.

"There are no dogs." and "没有" say so. "No problem! Here it is." and "I cannot see any image." do not: the first uses
the words for something else, the second has not looked. Words are English, Chinese, Japanese and Korean, and the
plainest of German, French, Spanish, Italian and Portuguese.
"""

import re

from perpo.rewards.completions import without_marks

_NOT = r"(?:\s?not|n['’]t)"
_IDIOMS = (
    "access|additional|answer|big|clue|comment|difference|doubt|explanation|further|idea|info|information|less|longer|"
    "matter|more|need|other|problem|problems|question|questions|reason|sense|thanks|trouble|way|wonder|worries|worry"
)
_NONE = re.compile(
    rf"""\[\s*+\]|\bnull\b|\bnone\b|\bnobody\b|\bno[ -]one\b|\bzero\b
    | \bnothing\b(?!\s+(?:i|we|you|wrong|else|more|special)\b)
    | ^\W*+no\W*+$ | \bno\s+(?!(?:{_IDIOMS})\b)\w
    | \bthere\s+(?:is|are|was|were){_NOT}\b(?!\s+(?:enough|much)\b)
    | \b(?:is|are|was|were|do|does|did|can|could){_NOT}\s+(?:any|there|see|visible|present|shown|appear|contain|show|
      include|find|detect|spot|locate)\b(?!\s+(?:what|where|whether|if|how|why|clearly|well|that|your|you)\b)
    | \b(?:kein(?:e[nrs]?)?|nichts|aucune?|rien|ning[uú]n[oa]?|nada|nessun[oa]?|nenhuma?)\b
    | (?<!有)[没沒]有(?![问問]|关系|關係|办法|辦法|[错錯]|足[够夠])
    | ^\W*+(?:[无無没沒零]|なし|ない|없음|없다)\W*+$
    | 不存在|未(?:发现|發現|检测到|檢測到|找到|看到|出现|出現)|[看找]不[到见見]
    | ありません|いません|存在しない|없습니다|없어요""",
    re.IGNORECASE | re.VERBOSE,
)
# The answer is about the picture itself: that it is missing, or that the model cannot look at it.
_IMAGE = r"(?:images?|pictures?|photo(?:s|graphs?)?|screenshots?|attachments?|files?)\b"
_UP_TO = r"(?:\s+(?!(?:in|on|of|from|with|within|at|inside|to)\b)[\w'’-]++){0,3}?\s+"  # words, but no "in the"
_SEE = "(?:see|view|access|open|process|analy[sz]e|find|receive|load|display|look)"
_PICTURE = "(?:图片|图像|照片|圖片|圖像|画像|이미지)"
_BLIND = re.compile(
    rf"""\bno{_UP_TO}{_IMAGE}(?!\s+(?:of|with|show)) | \bwithout{_UP_TO}{_IMAGE} | \bas\s+an\s+ai\b
    | (?:\b(?:can|could|do|does|did|was|am|is|are){_NOT}(?:\s+able\s+to)?|\bunable\s+to)\s+(?:\w++\s+)?
      (?:{_SEE}|there|any|have)(?:\s+at)?{_UP_TO}{_IMAGE}
    | \b{_IMAGE}\s+(?:(?:is|are|was|were|has|have|did|does|do|could|can){_NOT}|failed\s+to|is\s+missing)\s*+
      (?:been\s+|be\s+)?(?:visible|attached|provided|included|uploaded|shown|appear|load|available|there|present|seen|
      display|$|\W)
    | {_PICTURE}(?:没有|沒有|未|无法|無法)(?:被)?(?:显示|上传|提供|加载|附)
    | (?:没有|沒有|未|未能|无法|無法|不能|看不到)(?:看到|查看|收到|提供|上传|访问|加载|处理|识别)?
      [您你上传提供发送的任何张这该]{{0,8}}{_PICTURE}(?![中里上内])""",
    re.IGNORECASE | re.VERBOSE,
)


def says_none(text: str) -> bool:
    """Whether a text without any box or number says that there is none: by an empty list, or in words ("No dogs.")."""
    text = without_marks(text)
    return _NONE.search(text) is not None and _BLIND.search(text) is None
