PANEL: int

def pack(r: int, rank: int, cols: int, packed: int, column_norm: int, /) -> None: ...
def merge(
    w: int,
    w_kind: int,
    out: int,
    out_kind: int,
    rows: int,
    cols: int,
    rank: int,
    left: int,
    scale: int,
    packed: int,
    column_norm: int,
    open_list: int,
    capacity: int,
    /,
) -> tuple[int, int]: ...
