"""Checks that ptxas computed the descriptors of wgmma (Hopper's shared-memory operands) as the PTX specifies.

ptxas of Triton 3.6 starts some descriptors from a register that holds something else or was never set; the product then
reads other memory, without any error. This module evaluates the PTX and the SASS, and compares each product of the PTX
with its counterpart in the SASS.

A value is a symbol plus a constant. Symbol 0 is zero, so a value with it is a known number. Each value that cannot be
evaluated, such as a loop counter or loaded data, gets its own symbol. The SASS is followed along its branches; where
branches with different values meet, a new symbol is created. Two rules hold for each operand of each product:

- a number in the PTX is the same number in the SASS,
- operands within one block of the PTX with one symbol have one symbol in the SASS too, and the same differences.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple

SHARED_BASE = 0x400  # where dynamic shared memory begins; the first KB is reserved
LOW = (1 << 32) - 1
LONG = (1 << 64) - 1


class Value(NamedTuple):
    symbol: int
    offset: int


class Product(NamedTuple):
    shape: str  # such as 64x16x16
    block: int  # the basic block
    place: str
    a: Value | None  # None in registers
    b: Value


class Symbols:
    """Gives equal expressions equal symbols."""

    def __init__(self) -> None:
        self.numbers: dict[tuple[object, ...], int] = {}
        self.bits: dict[int, int] = {0: 0}  # of the symbol's value
        self.terms: dict[int, frozenset[Value]] = {}  # of an exclusive or
        self.unset: set[int] = set()  # built from a register that was never set

    def value(self, *key: object, bits: int = 64) -> Value:
        symbol = self.numbers.setdefault(key, len(self.numbers) + 1)
        self.bits[symbol] = bits
        if key[0] == "unset" or any(isinstance(x, Value) and x.symbol in self.unset for x in key):
            self.unset.add(symbol)
        return Value(symbol, 0)

    def add(self, x: Value, y: Value, mask: int) -> Value:
        if x.symbol and y.symbol:
            return self.value("add", *sorted((x, y)), mask)
        return Value(x.symbol or y.symbol, (x.offset + y.offset) & mask)

    def limit(self, x: Value) -> int:
        """The largest value that ``x`` can have, if it does not wrap around."""
        return (1 << self.bits[x.symbol]) - 1 + x.offset

    def shift_left(self, x: Value, count: Value, mask: int) -> Value:
        if x.symbol or count.symbol:
            return x if count == ZERO else self.value("shl", x, count, mask)
        return Value(0, x.offset << count.offset & mask)

    def shift_right(self, x: Value, count: Value, mask: int, signed: bool = False) -> Value:
        if x.symbol or count.symbol:
            return x if count == ZERO else self.value("shr", x, count, signed and mask)
        number = x.offset
        if signed and number > mask >> 1:
            number -= mask + 1
        return Value(0, number >> count.offset & mask)

    def low_bits(self, x: Value, count: int) -> Value:
        if x.symbol and self.limit(x) >> count:
            return self.value("low", x, count, bits=count)
        return x if x.symbol else Value(0, x.offset & (1 << count) - 1)

    def conjunction(self, x: Value, y: Value) -> Value:
        if x.symbol and y.symbol:
            return self.value("and", *sorted((x, y)))
        x, y = sorted((x, y))
        if x.offset & x.offset + 1 == 0:
            return self.low_bits(y, x.offset.bit_length())
        return self.value("and", x, y) if y.symbol else Value(0, x.offset & y.offset)

    def disjunction(self, x: Value, y: Value) -> Value:
        x, y = sorted((x, y))
        if x.symbol:
            return self.value("or", x, y)
        if not y.symbol:
            return Value(0, x.offset | y.offset)
        low = x.offset & -x.offset  # the lowest bit of the number; a smaller value is disjoint from it
        return Value(y.symbol, x.offset + y.offset) if self.limit(y) < low else self.value("or", x, y)

    def exclusive_disjunction(self, x: Value, y: Value) -> Value:
        """The exclusive or of two values; ptxas swaps two registers by three such instructions."""
        if not x.symbol and not y.symbol:
            return Value(0, x.offset ^ y.offset)
        terms: frozenset[Value] = frozenset()
        for value in (x, y):
            terms ^= self.terms.get(value.symbol, {value}) if not value.offset else {value}
        if len(terms) < 2:
            return next(iter(terms), ZERO)
        result = self.value("xor", *sorted(terms), bits=32)
        self.terms[result.symbol] = terms
        return result


ZERO = Value(0, 0)


def wrong_descriptors(ptx: str, sass: str) -> list[str]:
    """The faults of the descriptors in ``sass`` (from cuobjdump), compiled from ``ptx``; one line per product."""
    expected = _PTX(ptx).products()
    if not expected:
        return []
    code = _SASS(sass)
    found = code.products()
    if [x.shape for x in expected] != [x.shape for x in found]:
        return [f"{len(expected)} wgmma in the PTX, {len(found)} in the SASS, or in another order"]
    faults = []
    counterparts: dict[tuple[int, str, int], tuple[int, int, int]] = {}
    for right, actual in zip(expected, found, strict=True):
        for name, x, y in (("A", right.a, actual.a), ("B", right.b, actual.b)):
            place = f"{name} of the product {actual.shape} at {actual.place}"
            if x is None or y is None:
                if x != y:
                    faults.append(f"{place} is in registers or in shared memory, unlike in the PTX")
            elif y.symbol in code.symbols.unset:
                faults.append(f"{place}: its descriptor is built from a register that was never set")
            elif not x.symbol:
                if x != y:
                    value = "is not a constant" if y.symbol else f"is {y.offset:#x}"
                    faults.append(f"{place}: its descriptor {value}, expected {x.offset:#x}")
            else:
                difference = (y.offset - x.offset) & LONG
                first = counterparts.setdefault((right.block, name, x.symbol), (actual.block, y.symbol, difference))
                if first != (actual.block, y.symbol, difference):
                    faults.append(f"{place}: its descriptor does not differ from the others' as in the PTX")
    return faults


class _PTX:
    """A kernel in PTX; its registers have one definition each, except those of loops, which become symbols."""

    def __init__(self, text: str) -> None:
        self.lines = [line.strip() for line in text.splitlines()]
        self.symbols = Symbols()
        self.definitions: dict[str, tuple[str, list[str]] | None] = {}
        self.values: dict[str, Value] = {}
        for line in self.lines:
            if match := re.match(r"(@!?%\w+\s+)?([a-z][\w.:]*)\s+(%\w+),\s*([^{}]*);$", line):
                guard, operation, register, operands = match.groups()
                again = guard or register in self.definitions
                self.definitions[register] = None if again else (operation, operands.replace(" ", "").split(","))

    def products(self) -> list[Product]:
        products = []
        block = 0
        for number, line in enumerate(self.lines, 1):
            block += line.endswith(":") or "bra" in line
            if line.startswith("wgmma.mma_async"):
                (shape,) = re.findall(r"\.m(\d+n\d+k\d+)\.", line)
                a, b = re.findall(r"\{[^}]*\}|%\w+|\d+", line.split(None, 1)[1])[1:3]
                products.append(
                    Product(
                        re.sub("[nk]", "x", shape),
                        block,
                        f"line {number}",
                        None if a.startswith("{") else self.value(a),
                        self.value(b),
                    )
                )
        return products

    def value(self, operand: str) -> Value:
        if re.fullmatch(r"-?\d+", operand):
            return Value(0, int(operand) & LONG)
        if operand == "global_smem":
            return Value(0, SHARED_BASE)
        if operand not in self.values:
            definition = self.definitions.get(operand)
            value = self.evaluate(*definition) if definition else None
            self.values[operand] = value or self.symbols.value(operand)
        return self.values[operand]

    def evaluate(self, operation: str, operands: list[str]) -> Value | None:
        name, *suffixes = operation.split(".")
        kind = suffixes[-1] if suffixes else ""
        mask = LONG if kind.endswith("64") else LOW
        supported = "mov", "cvt", "add", "sub", "and", "or", "shl", "shr", "bfe", "mul", "mad"
        if name not in supported or kind[:1] not in ("b", "u", "s") or kind[1:] not in ("32", "64"):
            return None
        x, y, z = ([self.value(operand) for operand in operands] + [ZERO, ZERO])[:3]
        symbols = self.symbols
        if name == "mov" or operation in ("cvt.u64.u32", "cvt.u32.u64"):
            return x if not x.symbol or kind == "32" or name == "mov" else self.widen(x)
        if name == "add":
            return symbols.add(x, Value(y.symbol, y.offset & mask), mask)
        if name == "sub" and not y.symbol:
            return symbols.add(x, Value(0, -y.offset & mask), mask)
        if name == "and":
            return symbols.conjunction(x, Value(y.symbol, y.offset & mask))
        if name == "or":
            return symbols.disjunction(x, Value(y.symbol, y.offset & mask))
        if name == "shl":
            return symbols.shift_left(x, y, mask)
        if name == "shr":
            return symbols.shift_right(x, y, mask, kind[0] == "s")
        if name == "bfe" and not z.symbol and kind == "u32":
            return symbols.low_bits(symbols.shift_right(x, y, mask), z.offset)
        if name in ("mul", "mad") and "lo" in suffixes and not x.symbol and not y.symbol:
            return symbols.add(Value(0, x.offset * y.offset & mask), z, mask)
        return None

    def widen(self, x: Value) -> Value | None:
        return x if self.symbols.limit(x) <= LOW else None


class _Instruction(NamedTuple):
    address: int
    guard: str
    operation: str
    operands: list[str]


_State = dict[str, Value]


class _SASS:
    """A kernel in SASS. A state holds the values of the registers that were set; a predicate is 0, 1 or a symbol."""

    def __init__(self, text: str) -> None:
        self.symbols = Symbols()
        pattern = r"^\s+/\*([0-9a-f]{4,})\*/\s+(?:@(!?U?P\w+)\s+)?([A-Z][\w.]*)\s*([^;]*?)\s*;"
        self.code = [
            _Instruction(int(address, 16), guard, operation, [x.strip() for x in operands.split(",") if x.strip()])
            for address, guard, operation, operands in re.findall(pattern, text, re.MULTILINE)
        ]
        self.blocks = self.split()
        self.states = self.flow()

    def split(self) -> dict[int, list[_Instruction]]:
        """The basic blocks by their address."""
        starts = {self.code[0].address} if self.code else set()
        for instruction, following in zip(self.code, [*self.code[1:], None], strict=True):
            if target := _target(instruction):
                starts.add(target)
            if following and _ends_block(instruction):
                starts.add(following.address)
        blocks: dict[int, list[_Instruction]] = {}
        for instruction in self.code:
            if instruction.address in starts:
                current = blocks.setdefault(instruction.address, [])
            current.append(instruction)
        return blocks

    def flow(self) -> dict[int, _State]:
        """The state at the beginning of each block."""
        order = list(self.blocks)
        following = dict(zip(order, order[1:], strict=False))
        returns = [following[b] for b in order if self.blocks[b][-1].operation.startswith("CALL") and b in following]
        states: dict[int, _State] = {order[0]: {}} if order else {}
        pending = order[:1]
        while pending:
            block = pending.pop()
            state = dict(states[block])
            for instruction in self.blocks[block]:
                self.step(instruction, state)
            last = self.blocks[block][-1]
            successors = [target] if (target := _target(last)) else []
            if last.operation.startswith("RET"):
                successors += returns
            if block in following and (last.guard or not re.match(r"BRA$|EXIT|RET|CALL|BRX|JMP", last.operation)):
                successors.append(following[block])
            elif block in following and last.operation == "BRA" and len(last.operands) > 1:
                successors.append(following[block])  # BRA UP0, target
            for successor in successors:
                if successor in self.blocks and self.merge(states, successor, state):
                    pending.append(successor)
        return states

    def merge(self, states: dict[int, _State], block: int, state: _State) -> bool:
        if block not in states:
            states[block] = dict(state)
            return True
        old = states[block]
        changed = False
        for register in old.keys() | state.keys():
            if old.get(register) != state.get(register):
                value = self.symbols.value("meeting", block, register)
                changed |= old.get(register) != value
                old[register] = value
        return changed

    def products(self) -> list[Product]:
        products = []
        for block, instructions in self.blocks.items():
            if block not in self.states:
                continue
            state = dict(self.states[block])
            for instruction in instructions:
                if match := re.match(r"[A-Z]GMMA\.(\d+x\d+x\d+)", instruction.operation):
                    operand = next(i for i, x in enumerate(instruction.operands) if x.startswith("gdesc"))
                    (first,) = map(int, re.findall(r"gdesc\[UR(\d+)\]", instruction.operands[operand]))
                    in_registers = instruction.operands[operand - 1] != instruction.operands[0] or operand > 1
                    a = None if in_registers else self.descriptor(state, first)
                    place = f"{instruction.address:#x}"
                    products.append(Product(match[1], block, place, a, self.descriptor(state, first + 2)))
                self.step(instruction, state)
        return products

    def descriptor(self, state: _State, register: int) -> Value:
        low, high = (self.read(state, f"UR{i}") for i in (register, register + 1))
        return self.join(low, high)

    def join(self, low: Value, high: Value) -> Value:
        if not high.symbol and (not low.symbol or self.symbols.limit(low) <= LOW):
            return Value(low.symbol, high.offset << 32 | low.offset)
        return self.symbols.value("pair", low, high)

    def read(self, state: _State, operand: str) -> Value:
        operand = operand.removesuffix(".reuse")
        if operand in ("RZ", "URZ", "!PT", "!UPT", "SR_CgaCtaId"):
            return ZERO
        if operand in ("PT", "UPT"):
            return Value(0, 1)
        if re.fullmatch(r"-?0x[0-9a-f]+|-?\d+", operand):
            return Value(0, int(operand, 0) & LOW)
        if re.fullmatch(r"U?[RP]\d+", operand):
            return state[operand] if operand in state else self.symbols.value("unset", operand, bits=32)
        if operand.startswith("-") and not (x := self.read(state, operand[1:])).symbol:
            return Value(0, -x.offset & LOW)
        return self.symbols.value("operand", operand, *self.parts(state, operand), bits=32)

    def parts(self, state: _State, operand: str) -> Iterator[Value]:
        for register in re.findall(r"\bU?[RP]\d+\b", operand):
            yield self.read(state, register)

    def step(self, instruction: _Instruction, state: _State) -> None:
        """Execute one instruction."""
        address, guard, operation, operands = instruction
        if not operands:
            return
        if match := re.match(r"(LD|ST)L(\.64|\.128)?\b", operation):
            results = self.spill(match[1], _width(operation), operands, state)
        else:
            results = self.evaluate(operation, operands, state)
        if results is None:  # not followed: new symbols for all the registers that it may set
            results = {x: self.symbols.value("set", address, x, bits=32) for x in _sets(instruction)}
        for register, value in results.items():
            if guard and state.get(register) != value:
                value = self.symbols.value("guarded", address, register, bits=32)
            state[register] = value

    def spill(self, direction: str, width: int, operands: list[str], state: _State) -> dict[str, Value] | None:
        """A load from the stack or a store to it."""
        register, place = operands if direction == "LD" else operands[::-1]
        match = re.fullmatch(r"\[R1(?:\+(0x[0-9a-f]+))?\]", place)
        if not match or register == "RZ":
            return None
        start = int(match[1] or "0", 0)
        registers = [f"R{int(register[1:]) + i}" for i in range(width)]
        slots = [f"stack {start + 4 * i}" for i in range(width)]
        if direction == "LD":
            return {x: state[y] for x, y in zip(registers, slots, strict=True)} if set(slots) <= state.keys() else None
        return {y: self.read(state, x) for x, y in zip(registers, slots, strict=True)}

    def evaluate(self, operation: str, operands: list[str], state: _State) -> dict[str, Value] | None:
        operation = re.sub(r"\.(SPILL|FILL)$", "", operation)
        name = operation.removeprefix("U")
        symbols = self.symbols
        results = [operands[0]]
        rest = operands[1:]
        while rest and re.fullmatch(r"U?P(\d|T)", rest[0]):
            results.append(rest.pop(0))
        target = results[0]
        if not re.fullmatch(r"U?R\d+", target) or len(rest) == 0:
            return None
        carries = len(results) > 1
        if name == "IADD3.64" and not carries:
            x, y, z = (self.pair(state, operand) for operand in rest[:3])
            value = symbols.add(symbols.add(x, y, LONG), z, LONG)
            low, high = Value(value.symbol, value.offset & LOW), Value(0, value.offset >> 32)
            if value.symbol and symbols.limit(low) > LOW:
                low, high = symbols.value("low", value), symbols.value("high", value)
            return {target: low, _next(target): high}
        values = [self.read(state, operand) for operand in rest]
        if name in ("IADD3", "IADD3.X", "VIADD") and len(values) >= 2:
            terms = values[:3]
            if name == "IADD3.X":
                terms += values[3:]
            total, limit = ZERO, 0
            for term in terms:
                total = symbols.add(total, term, LOW)
                limit += symbols.limit(term)
            carry = [Value(0, 0)] if limit <= LOW else [symbols.value("carry", *terms)]
            if not any(term.symbol for term in terms):
                carry = [Value(0, sum(term.offset for term in terms) >> 32)]
            if len(results) > 2 and carry != [ZERO]:
                return None
            return {target: total, **{x: carry[0] for x in results[1:] if not x.endswith("T")}}
        if carries:
            return None
        if name == "MOV":
            return {target: values[0]}
        if re.fullmatch(r"IMAD(\.MOV|\.IADD|\.SHL)?(\.U32|\.X)?", name) and len(values) >= 3:
            x, y = values[:2]
            if x.symbol and y != Value(0, 1) or y.symbol:
                return None
            total = x if x.symbol else Value(0, x.offset * y.offset & LOW)
            for term in values[2:4] if name == "IMAD.X" else values[2:3]:
                total = symbols.add(total, term, LOW)
            return {target: total}
        if operation == "R2UR":
            return {target: values[-1]}
        if operation == "CS2R":
            return {target: ZERO, _next(target): ZERO} if rest[0] == "SRZ" else None
        if operation == "S2UR" or operation == "S2R":
            return {target: ZERO} if rest[0] == "SR_CgaCtaId" else None
        if name == "LEA" and len(values) == 3:
            return {target: symbols.add(symbols.shift_left(values[0], values[2], LOW), values[1], LOW)}
        if name in ("SHF.R.U32.HI", "SHF.R.S32.HI"):
            return {target: symbols.shift_right(values[2], values[1], LOW, name == "SHF.R.S32.HI")}
        if name == "SHF.L.U32":
            return {target: symbols.shift_left(values[0], values[1], LOW)}
        if name == "SGXT.U32" and not values[1].symbol:
            return {target: symbols.low_bits(values[0], values[1].offset)}
        operators = {"0xc0": symbols.conjunction, "0xfc": symbols.disjunction, "0x3c": symbols.exclusive_disjunction}
        if name == "LOP3.LUT" and values[2] == ZERO and rest[3] in operators:
            return {target: operators[rest[3]](values[0], values[1])}
        if name in ("LOP3.LUT", "SEL"):
            return {target: symbols.value(name, *values, bits=32)}
        return None

    def pair(self, state: _State, operand: str) -> Value:
        """The value of a uniform register and the next one, or of a number."""
        register = operand.removeprefix("-")
        value = self.read(state, register)
        if register != "URZ" and register.startswith("UR"):
            value = self.join(value, self.read(state, _next(register)))
        if register == operand:
            return value
        return self.symbols.value("minus", value) if value.symbol else Value(0, -value.offset & LONG)


def _next(register: str) -> str:
    return re.sub(r"\d+", lambda match: str(int(match[0]) + 1), register)


def _sets(instruction: _Instruction) -> Iterator[str]:
    """The registers that an instruction may set."""
    if re.match(r"ST|RED\b|RED\.|BAR|BRA|EXIT|WARP|DEPBAR|LDGSTS|UTMA|SYNCS|CALL|RET|NOP", instruction.operation):
        return
    for position, operand in enumerate(instruction.operands):
        if re.fullmatch(r"U?P\d", operand):
            yield operand
        elif position == 0 and (match := re.fullmatch(r"(U?R)(\d+)", operand)):
            yield from (f"{match[1]}{int(match[2]) + i}" for i in range(_width(instruction.operation)))
        else:
            return


def _width(operation: str) -> int:
    """The number of registers that a result has, at most."""
    if match := re.match(r"[A-Z]GMMA\.\d+x(\d+)x", operation):
        return int(match[1]) // 2
    if re.search(r"MMA|LDSM|\.128", operation):
        return 4
    return 2 if re.search(r"\.64|WIDE|F64|^D[A-Z]|CS2R", operation) else 1


def _target(instruction: _Instruction) -> int | None:
    if re.match(r"BRA|CALL|JMP", instruction.operation) and instruction.operands:
        match = re.search(r"0x([0-9a-f]+)", instruction.operands[-1])
        return int(match[1], 16) if match else None
    return None


def _ends_block(instruction: _Instruction) -> bool:
    return bool(re.match(r"BRA|CALL|JMP|EXIT|RET|BRX", instruction.operation))
