/* Tables of where C puts the fields of each struct, and of the constants that Python relies on. `../_native/structs.py`
 * compares them with its own when the library is loaded. */
#pragma once
#include <stddef.h>
#include <stdint.h>

typedef struct {
    const char *field; /* "" is the struct as a whole; NULL ends the table */
    int64_t offset, size;
} Layout;

#define WHOLE(structure) {"", 0, sizeof(structure)}
#define FIELD(structure, field) {#field, offsetof(structure, field), sizeof(((structure *)0)->field)}
#define CONSTANT(name) {#name, name, 0}
#define END {0, 0, 0}
