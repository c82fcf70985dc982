"""Student and teacher as the kernels of similarity_distill want them."""

from dataclasses import dataclass

import torch
from torch import Tensor

from m3bind_kernels.configs import INTERPRETED, Config, narrowed
from m3bind_kernels.launch import Inputs, descriptors_fit

MOST_RAGGED_COLUMNS = 64  # of two tiles, student's and teacher's


@dataclass(frozen=True, kw_only=True, slots=True)
class Sides:
    student: Inputs  # with the masks
    teacher: Inputs
    factors: Tensor  # [2] float32, by which dot products become logits in base 2

    @staticmethod
    def of(
        x: Tensor,
        y: Tensor,
        logit_scale: Tensor,
        teacher_x: Tensor,
        teacher_y: Tensor,
        teacher_scale: Tensor,
        row_mask: Tensor | None,
        col_mask: Tensor | None,
    ) -> "Sides":
        if torch.float32 in (x.dtype, teacher_x.dtype):  # the tiles of one kernel have one width
            x, y, teacher_x, teacher_y = (t.float() for t in (x, y, teacher_x, teacher_y))
        student = Inputs.of(x, y, logit_scale, None, None, row_mask, col_mask, 0.0, False)
        teacher = Inputs.of(teacher_x, teacher_y, teacher_scale, *(None,) * 4, 0.0, False)
        return Sides(
            student=student, teacher=teacher, factors=torch.cat([student.factor, teacher.factor])
        )

    def rows(self, band: slice) -> "Sides":
        """The same with some rows only."""
        return Sides(
            student=self.student.rows(band), teacher=self.teacher.rows(band), factors=self.factors
        )

    def pointers(self) -> tuple[Tensor, ...]:
        return self.student.x, self.student.y, self.teacher.x, self.teacher.y, self.factors

    def masks(self, config: Config) -> tuple[Tensor | None, ...]:
        """Masks of rows and columns, and their extremes in every block."""
        return (*self.student.numbers()[2:], *self.student.ranges(config)[2:])

    def sizes(self) -> tuple[int, ...]:
        """Rows, columns, features of the student and of the teacher."""
        return (*self.student.shape, self.student.x.shape[1], self.teacher.x.shape[1])

    def is_even(self, config: Config) -> bool:
        return all(side.x.shape[1] % config.block_k == 0 for side in (self.student, self.teacher))

    def fitting(self, config: Config) -> Config:
        return config if self.is_even(config) else narrowed(config, MOST_RAGGED_COLUMNS)

    def constants(self, config: Config) -> dict[str, bool]:
        return {
            "EVEN_K": self.is_even(config),
            "HAS_MASKS": self.student.row_mask is not None,
            "DESCRIPTORS": descriptors_fit(self.student) and descriptors_fit(self.teacher),
            "INTERPRETED": INTERPRETED,
        }
