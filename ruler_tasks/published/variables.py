"""Variable tracking as the published code draws it: one solved example for all samples, renamed for each."""

from __future__ import annotations

import string
from typing import Any

from ruler_tasks.fit import Filled
from ruler_tasks.published.drawing import LONG_FROM, Drawing, UndrawableError, search
from ruler_tasks.recipe import Setting

_EXAMPLE_TOKENS = 500
_EXAMPLE_STEP, _STEP, _SHORT_STEP = 5, 10, 5
_EXAMPLE_VALUE = "12345"
_EXAMPLE_LETTERS, _LETTERS = 3, 5


class ChainDrawing(Drawing):
    """The unit is a line of noise."""

    def __init__(self, setting: Setting, hops: int) -> None:
        super().__init__(setting)
        import numpy as np  # at import it would cost those who draw no such sample

        self.step = _STEP if setting.length >= LONG_FROM else _SHORT_STEP
        self._hops = hops
        self._values = np.random.RandomState(setting.seed)

    @property
    def source(self) -> str:
        return "noise" if self.setting.wording.vt_by_line else "noise, lines joined by spaces"

    def state(self) -> Any:
        return self.rng.getstate(), self._values.get_state()

    def restore(self, state: Any) -> None:
        self.rng.setstate(state[0])
        self._values.set_state(state[1])

    def _value(self) -> str:
        return str(self._values.randint(10000, 99999))

    def _name(self, letters: int) -> str:
        return "".join(self.rng.choices(string.ascii_uppercase, k=letters))

    def _text(self, units: int, letters: int, value: str | None) -> tuple[str, str, tuple[str, ...]]:
        """Template, answer prefix and variables of one draw."""
        wanted = self._hops + 1
        names = [self._name(letters) for _ in range(wanted)]
        while len(set(names)) < wanted:
            names.append(self._name(letters))
        given, value = value, value or self._value()
        if len(names) > wanted:
            # A name came twice: the published code takes what is over for a second chain, draws its value, and fails on it.
            if given is None:
                self._value()
            raise UndrawableError
        copies = zip(names[1:], names, strict=False)
        chain = [f"VAR {names[0]} = {value}", *(f"VAR {new} = VAR {old} " for new, old in copies)]
        if units < wanted:
            raise UndrawableError
        by_line = self.setting.wording.vt_by_line
        lines = [self.setting.wording.noise + "\n" * (not by_line)] * units
        for shift, (place, line) in enumerate(zip(sorted(self.rng.sample(range(units), wanted)), chain, strict=True)):
            lines.insert(place + shift, line)
        context = ("\n" if by_line else " ").join(lines).replace(". \n", ".\n")
        template, prefix = self.setting.wording.vt.render(context=context, query=value, count=wanted)
        return template, prefix, tuple(names)

    def search(self) -> int:
        self.example = self._solved_example()
        # The example is weighed apart: joined to the rest it may take a token more or less.
        taken = self.counted(self.example) + self.setting.answer
        return search(self._tokens, self.setting.length, taken, self.step)

    def _tokens(self, units: int) -> int:
        template, prefix, _ = self._text(units, _LETTERS, None)
        return self.counted(self.setting.frame.around(template) + prefix)

    def _example_tokens(self, units: int) -> int:
        template, prefix, _ = self._text(units, _EXAMPLE_LETTERS, _EXAMPLE_VALUE)
        return self.counted(template + prefix)

    def _solved_example(self) -> str:
        """An example of at most 500 tokens, found by the same search, with its answer."""
        units = search(self._example_tokens, _EXAMPLE_TOKENS, 0, _EXAMPLE_STEP)
        for _ in range(units):
            try:
                template, prefix, names = self._text(units, _EXAMPLE_LETTERS, _EXAMPLE_VALUE)
                if self.counted(template + prefix) <= _EXAMPLE_TOKENS:
                    return f"{template}{prefix} {' '.join(names)}\n"
            except UndrawableError:
                pass
            if units > _EXAMPLE_STEP:
                units -= _EXAMPLE_STEP
        raise UndrawableError

    def _renamed_example(self) -> str:
        """The example with other variables and another value, each put in place of the old one wherever that stands."""
        example = self.example
        for name in example.split()[-self._hops - 1 :]:
            example = example.replace(name, self._name(len(name)))
        return example.replace(_EXAMPLE_VALUE, self._value())

    def drawn(self, units: int, index: int) -> Filled:
        template, prefix, names = self._text(units, _LETTERS, None)
        text = f"{self._renamed_example()}\n{template}"
        return Filled(self.setting.frame.around(text), prefix, names, units)
