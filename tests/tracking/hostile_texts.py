"""Texts that try to be more than text: in HTML, in a terminal, or by hiding and reordering themselves."""

HOSTILE = (
    "<script>alert(1)</script>",
    "</script><script src=//evil.example/x.js></script>",
    '"><img src=x onerror=alert(1)>',
    "'><svg/onload=alert(1)>",
    "<svg><script href='data:text/javascript,alert(1)'/></svg>",
    '<a href="javascript:alert(1)">click</a>',
    '<iframe src="data:text/html,<script>alert(1)</script>"></iframe>',
    '<img src="https://evil.example/pixel.png">',
    '<link rel=stylesheet href="https://evil.example/x.css">',
    "</style><style>@import url(https://evil.example/x.css)</style>",
    "</title><meta http-equiv=refresh content='0;url=https://evil.example'>",
    "<base href=https://evil.example/><form action=https://evil.example><input autofocus onfocus=alert(1)>",
    "--><object data=evil.swf></object><embed src=evil.swf><!--",
    "{{ 7*7 }}{% for x in ().__class__.__base__.__subclasses__() %}{{ x }}{% endfor %}",
    "safe \u202egnp.exe\u202c \u2066isolate\u2069 \u200b\ufeff",
    "\x1b[31mred\x1b[0m \x1b]0;title\x07 \x1b]8;;https://evil.example\x1b\\link\x1b]8;;\x1b\\ \x9b2J \x08\x08\x00",
    "lone \udc80 surrogate \ud800",
    "[bold red]markup[/bold red] [link=https://evil.example]x[/link] [/]",
)
