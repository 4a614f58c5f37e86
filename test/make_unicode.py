#!/usr/bin/env python3
"""Writes unicode.h, the character tables of tokenizer.cpp. Nothing needs it to build: the result is in the repository.

    pip install unicodedata2==16.0.0
    python3 test/make_unicode.py nfc        with a Python whose unicodedata is Unicode 9.0 (Python 3.6): prints part 2
    python3 test/make_unicode.py classes    with unicodedata2 16.0.0: prints part 1

    (python3 test/make_unicode.py classes; python3.6 test/make_unicode.py nfc) > unicode.h

The versions are those of Hugging Face tokenizers 0.23, found by comparing every code point: its regular expressions know
Unicode 16.0, its NFC knows Unicode 9.0.

A table is a row of numbers in base 28, most significant digit first: '#' + d is the last digit of a number, '#' + 28 + d
any other. (So every character is printable, and none is a quote, a backslash or a question mark of a trigraph.)
"""
import sys

LAST = 0x110000


def number(n):
    digits = [n % 28]
    while n >= 28:
        n //= 28
        digits.append(n % 28 + 28)
    return "".join(chr(ord("#") + d) for d in reversed(digits))


def c_string(name, comment, numbers):
    # '?' is written as an escape so that no trigraph arises
    text = "".join(number(n) for n in numbers)
    lines = [text[i:i + 104] for i in range(0, len(text), 104)]
    out = ["".join("// " + c + "\n" for c in comment) + "const char %s[] =" % name]
    out += ['    "%s"' % line.replace("?", "\\?") for line in lines]
    return "\n".join(out) + ";\n"


def runs(kind):
    """Runs of equal kind other than 0, as (gap since the last run, length, kind)."""
    result, end, c = [], 0, 0
    while c < LAST:
        k = kind(c)
        if not k:
            c += 1
            continue
        first = c
        while c < LAST and kind(c) == k:
            c += 1
        result.append((first - end, c - first, k))
        end = c
    return result


def classes():
    sys.path.insert(0, ".")
    import unicodedata2 as u
    assert u.unidata_version == "16.0.0", u.unidata_version
    # The letters of Other_Alphabetic that are no marks: circled and squared ones.
    circled = [c for a, b in ((0x24B6, 0x24E9), (0x1F130, 0x1F149), (0x1F150, 0x1F169), (0x1F170, 0x1F189))
               for c in range(a, b + 1)]
    kinds = bytearray(LAST)
    for c in range(LAST):
        category = u.category(chr(c))
        if category[0] == "L":
            kinds[c] = 1
        elif category[0] == "N":
            kinds[c] = 3 if category == "No" else 2
        elif category[0] == "M" or category == "Pc" or c in (0x200C, 0x200D):
            kinds[c] = 4
    for c in circled:
        kinds[c] = 4
    print("// unicode.h: the character tables of tokenizer.cpp, written by test/make_unicode.py, which explains them.")
    print("#pragma once\n")
    print(c_string("unicode_classes",
                   ["Runs of Unicode 16.0 as gap, 4 * length + kind: 0 letters (general category L*), 1 numbers that are in \\w",
                    "(Nd, Nl), 2 other numbers (No), 3 the rest of \\w (marks, Pc, joiners, circled letters)."],
                   [n for gap, length, k in runs(lambda c: kinds[c]) for n in (gap, 4 * length + k - 1)]))


def nfc():
    import unicodedata as u
    assert u.unidata_version == "9.0.0", u.unidata_version
    ccc = [u.combining(chr(c)) for c in range(LAST)]
    print(c_string("unicode_combining", ["Canonical combining classes of Unicode 9.0: runs as gap, length, class."],
                   [n for run in runs(lambda c: ccc[c]) for n in run]))
    numbers, last = [], 0
    for c in range(LAST):
        d = u.decomposition(chr(c))
        if not d or d.startswith("<"):
            continue
        p = [int(x, 16) for x in d.split()]
        composes = len(p) == 2 and u.normalize("NFC", chr(p[0]) + chr(p[1])) == chr(c)
        if len(p) == 2:
            numbers += [2 * (c - last) + 1, p[0], 2 * p[1] + composes]
        else:
            numbers += [2 * (c - last), p[0]]
        last = c
    print(c_string("unicode_decompositions",
                   ["Canonical decompositions of Unicode 9.0, without Hangul: 2 * (code point - previous one) + (two parts),",
                    "the first part, and where there are two, 2 * the second + (NFC composes them again)."], numbers), end="")


if __name__ == "__main__":
    {"classes": classes, "nfc": nfc}[sys.argv[1]]()
