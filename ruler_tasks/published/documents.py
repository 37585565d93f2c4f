"""Questions as the published code asks them: in the order of the file, the needed documents at one place in all samples."""

from __future__ import annotations

from ruler_tasks.errors import SourceError
from ruler_tasks.fit import Filled
from ruler_tasks.published.drawing import Drawing, UndrawableError
from ruler_tasks.qa import Questions
from ruler_tasks.recipe import Setting


class DocumentDrawing(Drawing):
    """`qa_1` and `qa_2`. The unit is a document; the search is made with the first question alone."""

    def __init__(self, setting: Setting, task: Questions) -> None:
        super().__init__(setting)
        self._set = task.question_set(setting)

    @property
    def source(self) -> str:
        return self._set.source

    def drawn(self, units: int, index: int) -> Filled:
        questions = self._set.questions
        if index >= len(questions):
            raise SourceError(
                f"{self._set.source} has {len(questions)} questions, each of which the reference asks once: "
                f"ask for at most {len(questions)} samples."
            )
        question = questions[index]
        documents = [self._set.documents[number] for number in self._chosen(units, index)]
        self.shuffled(documents)
        form = self.setting.wording.document
        context = "\n\n".join(form.format(i=number, document=text) for number, text in enumerate(documents, 1))
        template, prefix = self.setting.wording.qa.render(context=context, query=question.query)
        return Filled(self.setting.frame.around(template), prefix, question.outputs, units)

    def _chosen(self, units: int, index: int) -> list[int]:
        """The numbers of the documents: those given with the question, related ones, others, in this order."""
        question = self._set.questions[index]
        total = len(self._set.documents)
        if units >= total:
            return (list(range(total)) * -(-units // total))[:units]
        given = list(question.given or question.gold)
        related = [number for number in question.related if number not in given]
        room = units - len(given)
        if room < 0:
            raise UndrawableError
        if room <= len(related):
            return given + self.rng.sample(related, room)
        taken = {*given, *related}
        others = [number for number in range(total) if number not in taken]
        return given + related + self.rng.sample(others, room - len(related))
