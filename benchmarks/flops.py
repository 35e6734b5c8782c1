"""python -m benchmarks.flops: multiply-accumulates of DiT-XL/2 and its student, as a Markdown table.

They are counted in the traced networks; the tests check that against formulas.
"""

from ard_jax.models import ARDStudent, DiT, size_fields
from ard_jax.models.flops import student_macs, teacher_macs

LATENT = (32, 32, 4)


def rows() -> list[tuple[str, float, str]]:
    """What, GMAC an image here, and the paper's method page."""
    fields = size_fields("DiT-XL/2")
    teacher = teacher_macs(DiT(**fields), LATENT) / 1e9

    def student(history_layers: int) -> float:
        return student_macs(ARDStudent(DiT(**fields), steps=4, history_layers=history_layers), LATENT) / 1e9

    return [
        ("teacher, one call", teacher, "118.62"),
        ("teacher, 25 steps with guidance", 50 * teacher, "5931"),
        ("student, 4 steps, N = 0", student(0), "704.6 as published; 474.5 with one modulation a block"),
        ("student, 4 steps, N = 6", student(6), "710.0 as published; 479.9 with one modulation a block"),
        ("student, 4 steps, N = 28", student(28), "499.9 with one modulation a block"),
    ]


def main() -> None:
    table = rows()
    print("| DiT-XL/2, 256 tokens | GMAC an image, here | reference |\n|---|---|---|")
    for what, gmac, reference in table:
        print(f"| {what} | {gmac:.2f} | {reference} |")
    n0, n6 = table[2][1], table[3][1]
    print(f"\nN = 6 over N = 0: {n6 / n0:.4f}. N = 6 over 480 GMAC: {n6 / 480:.4f}.")


if __name__ == "__main__":
    main()
