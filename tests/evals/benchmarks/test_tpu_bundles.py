import pytest

from routing_jax.evals.benchmarks.tpu_bundles import (
    bundles,
    grid_parts,
    kernel_schedules,
    read_regions,
    row_parts,
)

# Programs at depth 1; in the first, steps at depth 2 with branches, an empty bundle,
# which shows no depth, and a branch around the whole loop. Comments may run over lines.
ROWS = """
     0   :  { %1 = a }
   0x1 LB: > { %2 = b } /* Start region 7 */
   0x2   : > { %3 = sbr.rel (%p1_p0) target = $region9 /* a window
0x0 of something */ }
   0x3 LB: >> { %4 = c } /* Start region 8 :: Start region 6 */
   0x4   : >> { %5 = sbr.rel (%p2_p0) target = $region5 }
   0x5   : >> { %6 = sbr.rel (%p3_p0) target = $region4 }
   0x6   :  {} /* End region 6 */
   0x7 PF: >> { %7 = d } /* Start/End empty region 4 */
   0x8   : >> { %8 = sbr.rel (%p4_p0) target = $region3 }
   0x9   : >> { %9 = e }
   0xa   : >> { %10 = f }
   0xb PF: >> { %11 = g } /* Start/End empty region 3 :: Start/End empty region 5 */
   0xc   : >> { %12 = sbr.rel (!%p5_p0) target = $region8 }
   0xd PF: > { %13 = h } /* Start/End empty region 9 */
   0xe   : > { %14 = sbr.rel (!%p6_p0) target = $region7 }
   0xf   :  { %15 = i }
"""

GRID = """
     0 LB: > { %2 = b } /* Start region 7 */
   0x1   : > { %3 = sbr.rel (%p1_p0) target = $region9 }
   0x2   : > { %3 = sbr.rel (%p1_p0) target = $region1 }
   0x3   : > { %4 = init }
   0x4   : > { %4 = sbr.rel (%p1_p0) target = $region2 } /* Start region 1 */
   0x5   : > { %5 = run }
   0x6   : > { %6 = run }
   0x7   : > { %7 = sbr.rel (%p1_p0) target = $region3 } /* Start region 2 */
   0x8   : > { %8 = end }
   0x9   : > { %9 = tail } /* Start region 3 */
   0xa   : > { %14 = sbr.rel (!%p6_p0) target = $region7 } /* Start region 9 */
"""

UNITS = """== CAPACTIY:
MXU, XLU, VALU
  2    1     4
== UTILIZATION:
"""


def test_the_parts_of_a_kernel_with_a_loop_over_blocks():
    found = bundles(row_parts(read_regions(ROWS)))
    assert found == {"program": 4, "turn_1": 10}


def test_the_parts_of_a_kernel_that_takes_several_blocks_in_a_turn():
    second = """   0xd LB: >> { %13 = h } /* Start region 12 */
   0xe   : >> { %13 = sbr.rel (!%p5_p0) target = $region12 }
   0xf PF:"""
    two = ROWS.replace("   0xd PF:", second).replace("   0xe   : > {", "  0x10   : > {")
    assert bundles(row_parts(read_regions(two))) == {"turn_2": 10, "turn_1": 2, "program": 4}


def test_the_parts_of_a_kernel_with_a_grid_over_blocks():
    found = bundles(grid_parts(read_regions(GRID)))
    assert found == {"program": 7, "run": 2, "first": 1, "last": 1}


def test_a_schedule_of_another_form_is_not_summed():
    with pytest.raises(ValueError, match="no loop over blocks"):
        row_parts(read_regions(GRID))
    with pytest.raises(ValueError, match="1 loops within a program; 0 was"):
        grid_parts(read_regions(ROWS))


def test_kernels_are_found_by_name(tmp_path):
    for name, text in (("block_sparse_forward.1", ROWS), ("splash_mqa", GRID), ("copy.2", "")):
        (tmp_path / f"17-{name}-03-final_bundles.txt").write_text(text)
        used = UNITS + "2 0 4\n" * 32
        (tmp_path / f"17-{name}-01-final_hlo-static-per-bundle-utilization.txt").write_text(used)
    found = kernel_schedules(tmp_path)
    assert {name: kernel["bundles"]["program"] for name, kernel in found.items()} == {
        "block_sparse_forward": 4,
        "splash_mqa": 7,
    }
    assert found["splash_mqa"]["slots"] == {"MXU": 1.0, "XLU": 0.0, "VALU": 1.0}
