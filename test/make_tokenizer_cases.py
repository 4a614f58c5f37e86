#!/usr/bin/env python3
"""Writes test/tokenizer_cases.json: what Hugging Face tokenizers 0.23.3 makes of a few hundred texts.

    pip install tokenizers==0.23.3
    python3 test/make_tokenizer_cases.py > test/tokenizer_cases.json

It holds a text to train on, three tokenizers trained on it (the shapes of GPT-2, GPT-NeoX and cl100k), and cases: a text
and its ids by each. Then sets of added tokens with every flag, each put into the first tokenizer, and texts around them.
A development check: the tests need the result only.
"""
import json
import random

import tokenizers
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

CL100K = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
          r"|\s*[\r\n]+|\s+(?!\S)|\s+")

TEXT = """A tokenizer cuts a text into tokens, and it's the tokens that a model reads. The pair that occurs most often becomes
a token; then the next pair, and the next, until the vocabulary is full. We'll see that the order of the merges is all that
there is to know: they're the tokenizer.

    for (int i = 0; i < 10; ++i) {
        total += counts[i] * 1000;    // 2024, 2025, 2026
    }

Don't cut a word where a blank, a number (12345, 67890) or a sign... begins -- -- ---- -------- ............ ============
Le caf\u00e9 est ferm\u00e9, la for\u00eat est verte; le caf\u00e9 d'\u00e0 c\u00f4t\u00e9 aussi. \u4eca\u65e5\u306f\u4e16\u754c\u3001\u4e16\u754c\u306f\u4eca\u65e5\u3002
\u043f\u0440\u0438\u0432\u0435\u0442 \u043c\u0438\u0440, \u043f\u0440\u0438\u0432\u0435\u0442! \u05e9\u05dc\u05d5\u05dd \u05e2\u05d5\u05dc\u05dd \U0001F600\U0001F600 \U0001F468\u200d\U0001F469\u200d\U0001F467
aaaaaaaaaaaaaaaa aaaa aaaab xaaab yaaaab aaa\n\n\n\nThe end\t\tof\tthe text.
"""


def train(split, decoder, special, nfc):
    t = Tokenizer(models.BPE())
    if nfc:
        t.normalizer = normalizers.NFC()
    t.pre_tokenizer = split
    t.decoder = decoder
    t.train_from_iterator([TEXT], trainers.BpeTrainer(vocab_size=420, special_tokens=special, show_progress=False,
                                                      initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    return t


def cases():
    r = random.Random(1)
    texts = ["", " ", "  ", "a", "\n", " \n ", "\r\n\r\n", "it's IT'S we'll WE'LL 're'RE 'm'M 'd'D 've'VE 't'T '\u017f ''s '", "x'sy",
             "<|endoftext|>", "a<|endoftext|>b", " <|endoftext|> <|endoftext", "<|endoftext|><|endoftext|>",
             "the  text   with    blanks     ", "1 12 123 1234 12345 \u0661\u0662\u0663\u0664 \u00bd\u2167\u4e00", "caf\u00e9 cafe\u0301",
             "a\u0323\u0301 a\u0301\u0323 \u1e9b\u0323 \u212b \u2126 \uf900 \u0344", "\u1100\u1161\u11a8 \uac00\u11a8 \ud55c\uae00 \u1112\u1161\u11ab\u1100\u1173\u11af",
             "\u0958 \u09dc \u2adc \ufb1d \U0001d15e \U0002f800", "\u0d4a\u0d46\u0d3e", "\u304b\u3099", "e\u0301\u0301\u0301", "\u0301abc", "q\u0307\u0323", "a" * 300, "-" * 300,
             " " * 300, "\n" * 300, "\u4e16" * 50, "ab" * 100, "\U0001F468\u200d\U0001F469\u200d\U0001F467 \U0001F44D\U0001F3FD \U0001F1E6\U0001F1FA \u2764\ufe0f",
             "\u200b\u200c\u200d\ufeff\u2060", "\u202eabc\u202c \u05e9\u05dc\u05d5\u05dd \u0645\u0631\u062d\u0628\u0627", "\x00\x01\x1b\x7f\x80\x85\xa0\xad"]
    spaces = [chr(c) for c in (9, 10, 11, 12, 13, 28, 31, 32, 0x85, 0xa0, 0x1680, 0x180e, 0x2000, 0x200a, 0x2028, 0x2029,
                               0x202f, 0x205f, 0x3000)]
    texts += ["a%s%sb" % (s, t) for s in spaces for t in (" ", s)]
    parts = spaces + list("abT'.!?-_=,;\"(){}0179") + TEXT.split(" ") + [
        "'s", "'LL", "<|endoftext|>", "\u00e9", "e\u0301", "\u0323", "\u0301", "\u4e16\u754c", "\u00b2", "\u0967", "\U0001F600", "\U00010fff", "\U000f0000",
        "\ua7dc", "\u1c89", "  ", "    ", "\n\n", "\uac00", "\u11a8"]
    for _ in range(230):
        texts.append("".join(r.choice(parts) + r.choice(["", "", " "]) for _ in range(r.randrange(1, 9))))
    for plane in range(17):
        for _ in range(4):
            c = r.randrange(plane << 16, (plane + 1) << 16)
            if not 0xD800 <= c < 0xE000:
                texts.append("a %s%s" % (chr(c), chr(c)))
    return list(dict.fromkeys(texts))


def added_sets(base):
    """Added tokens that overlap, hold white space, or stand beside words; texts and their ids by the tokenizer `base`."""
    r = random.Random(2)
    contents = ["<a>", "<a", "a>", "<a><b>", "ab", "abc", "b", " ", "  ", "\n", "\t", " a", "a ", "\u3000", "e\u0301", "e", "\u0301", "\u212b",
                "\u1100", "\u1161", "\u4e16", "_x", "12", "'s"]
    beside = ["a", "_", "\u00e9", "\u0301", "\u4e16", "\u0663", "\u00b2", "\u216b", "\u24b6", "\U0001f130", "\u203f", "\u200d", "\u200b", "-",
              "\u0903", "\U0001e94b", "\u00aa", "\u2070", "\u309b", " ", "\u00a0", "\u2028", "\x85", "\x1c", "\ufeff", "\u1680", "\r\n", "  "]
    sets = []
    for k in range(24):
        added, next_id = [], len(base["model"]["vocab"])
        for content in r.sample(contents, r.choice([1, 2, 4, 8])):
            flags = {f: r.random() < 0.4 for f in ("single_word", "lstrip", "rstrip", "normalized", "special")}
            token = {"id": base["model"]["vocab"].get(content, next_id), "content": content, **flags}
            next_id += token["id"] == next_id
            added.append(token)
        t = {**base, "added_tokens": added, "normalizer": {"type": "NFC"} if k % 2 else None}
        encoder, cases = Tokenizer.from_str(json.dumps(t)), []
        while len(cases) < 24:
            text = "".join(r.choice([a["content"] for a in added] if r.random() < 0.5 else beside) for _ in range(r.randrange(1, 8)))
            try:
                cases.append({"text": text, "ids": encoder.encode(text).ids})
            except BaseException as e:  # it panics where lstrip meets white space that is taken
                assert "bad split" in str(e), e
        sets.append({"added_tokens": added, "normalizer": t["normalizer"], "cases": cases})
    return sets


def main():
    gpt2 = pre_tokenizers.ByteLevel(add_prefix_space=False)
    cl100k = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(CL100K), "isolated"),
                                      pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    byte_level = decoders.ByteLevel()
    made = {"gpt2": train(gpt2, byte_level, [], False), "neox": train(gpt2, byte_level, ["<|endoftext|>"], True),
            "cl100k": train(cl100k, byte_level, [], False)}
    made["gpt2"].add_tokens([AddedToken("<|endoftext|>", special=True, normalized=True)])
    made["neox"].add_tokens([AddedToken(" " * n, normalized=True) for n in range(8, 1, -1)])
    made["cl100k"].add_tokens([AddedToken("<|endoftext|>", special=True, normalized=False)])
    texts = cases()
    print('{"made_by": "Hugging Face tokenizers %s",' % tokenizers.__version__)
    print('"text": %s,' % json.dumps(TEXT))
    print('"tokenizers": {')
    for i, (name, t) in enumerate(made.items()):
        print('"%s": %s%s' % (name, json.dumps(json.loads(t.to_str())), "," if i + 1 < len(made) else "},"))
    print('"cases": [')
    for i, text in enumerate(texts):
        case = {"text": text, **{name: t.encode(text).ids for name, t in made.items()}}
        print(json.dumps(case) + ("," if i + 1 < len(texts) else "],"))
    print('"added": [')
    sets = added_sets(json.loads(made["gpt2"].to_str()))
    for i, added in enumerate(sets):
        print(json.dumps(added) + ("," if i + 1 < len(sets) else "]}"))


if __name__ == "__main__":
    main()
