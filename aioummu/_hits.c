// SPDX-License-Identifier: MIT
/*
 * The part of the registration cache that runs with each hit: the index, and a use of
 * an entry that is there and true. All else is in _cache.py.
 *
 * In Python, a hit takes as long as nine look-ups in a dict, or 25 if it is a part of
 * what is registered. Here there is no coroutine for what never waits.
 *
 * Everything runs in the event loop, under the interpreter's lock.
 */
#ifndef Py_GIL_DISABLED
#define Py_LIMITED_API 0x030B0000
#endif
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#include <structmember.h>

/* A registration in the index, or one that was there. Subclassed in Python. */
struct entry {
	PyObject_HEAD
	uint64_t start;
	uint64_t end;
	PyObject *registration;
	/* While page[index] equals settled, the registration is true. */
	PyObject *page;
	PyObject *index;
	PyObject *settled;
	Py_ssize_t users;
	Py_ssize_t hits;
	/* The later it was used, the higher. */
	uint64_t stamp;
	/* In the index of a cache that has nothing else to ask before it is used. */
	char is_simple;
};

struct row {
	uint64_t start;
	union {
		struct entry *entry;
		struct block *block;
	};
};

#define ROWS_PER_BLOCK 256

struct block {
	Py_ssize_t count;
	struct row rows[ROWS_PER_BLOCK];
};

/*
 * No entry lies within another. So both starts and ends ascend, and the one that covers
 * a range, if any, is the last that starts at or before it.
 *
 * Rows of entries are in blocks, none of them empty, so that an insertion moves a few of
 * them only, however many there are.
 */
struct index {
	PyObject_HEAD
	/* Of entries. */
	Py_ssize_t count;
	/* Rows of blocks, each with the start of its first row. */
	struct row *blocks;
	Py_ssize_t block_count;
	Py_ssize_t room;
	/* Of the latest use. */
	uint64_t clock;
	/* There is something to be done by the next one who leaves. */
	char is_pending;
};

/*
 * What get() returns: a context manager, to be entered once at a time.
 *
 * Also the awaitable that its own __aenter__() returns, which gives the registration
 * without waiting. Not the entry: subclasses do not inherit am_send.
 */
struct use {
	PyObject_HEAD
	struct index *index;
	/* As they were given. */
	PyObject *start;
	PyObject *end;
	/* The entry that is used, while it is. */
	struct entry *entry;
};

struct state {
	PyTypeObject *entry_type;
	PyTypeObject *use_type;
	/* What leaving returns if there is nothing to wait for. */
	PyObject *done;
};

static void release(PyObject *object)
{
	PyTypeObject *type = Py_TYPE(object);

	((freefunc)PyType_GetSlot(type, Py_tp_free))(object);
	Py_DECREF(type);
}

/* Awaitables that never wait, and give a value. */

static PySendResult give(PyObject *value, PyObject **result)
{
	*result = Py_NewRef(value ? value : Py_None);
	return PYGEN_RETURN;
}

/* For those who iterate, the value comes as an exception. */
static PyObject *give_by_exception(PyObject *value)
{
	PyObject *stop = PyObject_CallFunctionObjArgs(PyExc_StopIteration,
						      value ? value : Py_None, NULL);

	if (stop) {
		PyErr_SetObject(PyExc_StopIteration, stop);
		Py_DECREF(stop);
	}
	return NULL;
}

static PySendResult done_send(PyObject *self, PyObject *unused, PyObject **result)
{
	(void)self;
	(void)unused;
	return give(NULL, result);
}

static PyObject *done_next(PyObject *self)
{
	(void)self;
	return give_by_exception(NULL);
}

static int done_traverse(PyObject *object, visitproc visit, void *arg)
{
	Py_VISIT(Py_TYPE(object));
	return 0;
}

static void done_dealloc(PyObject *object)
{
	PyObject_GC_UnTrack(object);
	release(object);
}

static PyType_Slot done_slots[] = {
	{ Py_tp_traverse, done_traverse },
	{ Py_tp_dealloc, done_dealloc },
	{ Py_tp_iter, PyObject_SelfIter },
	{ Py_tp_iternext, done_next },
	{ Py_am_await, PyObject_SelfIter },
	{ Py_am_send, done_send },
	{ 0, NULL },
};

static PyType_Spec done_spec = {
	.name = "aioummu._hits.Done",
	.basicsize = sizeof(PyObject),
	.flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC,
	.slots = done_slots,
};

/* Entries. */

static int entry_is_settled(struct entry *self)
{
	PyObject *word;
	int result;

	if (!self->page || !self->index || !self->settled)
		return 0;
	word = PyObject_GetItem(self->page, self->index);
	if (!word) {
		/* Released: the notifier was closed, or this is a forked child. */
		if (!PyErr_ExceptionMatches(PyExc_ValueError) &&
		    !PyErr_ExceptionMatches(PyExc_IndexError))
			return -1;
		PyErr_Clear();
		return 0;
	}
	result = PyObject_RichCompareBool(word, self->settled, Py_EQ);
	Py_DECREF(word);
	return result;
}

static int entry_traverse(PyObject *object, visitproc visit, void *arg)
{
	struct entry *self = (struct entry *)object;

	Py_VISIT(Py_TYPE(object));
	Py_VISIT(self->registration);
	Py_VISIT(self->page);
	Py_VISIT(self->index);
	Py_VISIT(self->settled);
	return 0;
}

static int entry_clear(PyObject *object)
{
	struct entry *self = (struct entry *)object;

	Py_CLEAR(self->registration);
	Py_CLEAR(self->page);
	Py_CLEAR(self->index);
	Py_CLEAR(self->settled);
	return 0;
}

static void entry_dealloc(PyObject *object)
{
	PyObject_GC_UnTrack(object);
	entry_clear(object);
	release(object);
}

#define ENTRY_MEMBER(name, kind) { #name, kind, offsetof(struct entry, name), 0, NULL }

static PyMemberDef entry_members[] = {
	/* Set before it is in an index, and not changed there. */
	ENTRY_MEMBER(start, T_ULONGLONG),
	ENTRY_MEMBER(end, T_ULONGLONG),
	ENTRY_MEMBER(registration, T_OBJECT),
	ENTRY_MEMBER(page, T_OBJECT),
	ENTRY_MEMBER(index, T_OBJECT),
	ENTRY_MEMBER(settled, T_OBJECT),
	ENTRY_MEMBER(users, T_PYSSIZET),
	ENTRY_MEMBER(hits, T_PYSSIZET),
	ENTRY_MEMBER(stamp, T_ULONGLONG),
	ENTRY_MEMBER(is_simple, T_BOOL),
	{ NULL, 0, 0, 0, NULL },
};

static PyType_Slot entry_slots[] = {
	{ Py_tp_members, entry_members },
	{ Py_tp_traverse, entry_traverse },
	{ Py_tp_clear, entry_clear },
	{ Py_tp_dealloc, entry_dealloc },
	{ 0, NULL },
};

static PyType_Spec entry_spec = {
	.name = "aioummu._hits.Entry",
	.basicsize = sizeof(struct entry),
	.flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_BASETYPE | Py_TPFLAGS_HAVE_GC,
	.slots = entry_slots,
};

/* The index. */

/* Returns how many rows start at or before an address. */
static Py_ssize_t rows_search(const struct row *rows, Py_ssize_t count, uint64_t start)
{
	const struct row *row = rows;

	while (count > 0) {
		const Py_ssize_t half = count / 2;

		if (row[half].start <= start) {
			row += half + 1;
			count -= half + 1;
		} else {
			count = half;
		}
	}
	return row - rows;
}

static void rows_insert(struct row *rows, Py_ssize_t *count, Py_ssize_t place,
			struct row row)
{
	memmove(&rows[place + 1], &rows[place], (*count - place) * sizeof(*rows));
	rows[place] = row;
	++*count;
}

static void rows_remove(struct row *rows, Py_ssize_t *count, Py_ssize_t place)
{
	--*count;
	memmove(&rows[place], &rows[place + 1], (*count - place) * sizeof(*rows));
}

/* Returns the number of the block in which an address is, or would be; at least 0. */
static Py_ssize_t index_search(const struct index *self, uint64_t start)
{
	const Py_ssize_t behind = rows_search(self->blocks, self->block_count, start);

	return behind ? behind - 1 : 0;
}

static struct entry *index_covering(const struct index *self, uint64_t start,
				    uint64_t end)
{
	const struct block *block;
	struct entry *entry;
	Py_ssize_t behind;

	if (!self->count)
		return NULL;
	block = self->blocks[index_search(self, start)].block;
	behind = rows_search(block->rows, block->count, start);
	entry = behind ? block->rows[behind - 1].entry : NULL;
	return entry && entry->end >= end ? entry : NULL;
}

/* Returns false, with an exception, if there is no memory for one more block. */
static int index_add_block(struct index *self, Py_ssize_t place, uint64_t start)
{
	struct block *block = PyMem_Malloc(sizeof(*block));

	if (block && self->block_count == self->room) {
		const Py_ssize_t room = self->room ? 2 * self->room : 4;
		struct row *rows = PyMem_Realloc(self->blocks, room * sizeof(*rows));

		if (rows) {
			self->blocks = rows;
			self->room = room;
		} else {
			PyMem_Free(block);
			block = NULL;
		}
	}
	if (!block) {
		PyErr_NoMemory();
		return 0;
	}
	block->count = 0;
	rows_insert(self->blocks, &self->block_count, place,
		    (struct row){ .start = start, .block = block });
	return 1;
}

static void index_remove_block(struct index *self, Py_ssize_t place)
{
	PyMem_Free(self->blocks[place].block);
	rows_remove(self->blocks, &self->block_count, place);
}

/* Moves the upper half of a full block into a new one behind it. */
static int index_split(struct index *self, Py_ssize_t place)
{
	struct block *lower = self->blocks[place].block, *upper;
	const Py_ssize_t left = ROWS_PER_BLOCK / 2;

	if (!index_add_block(self, place + 1, lower->rows[left].start))
		return 0;
	upper = self->blocks[place + 1].block;
	upper->count = lower->count - left;
	memcpy(upper->rows, &lower->rows[left], upper->count * sizeof(*upper->rows));
	lower->count = left;
	return 1;
}

/* Moves the rows of the next block into this one, if together they are few. */
static void index_join(struct index *self, Py_ssize_t place)
{
	struct block *lower, *upper;

	if (place < 0 || place + 1 >= self->block_count)
		return;
	lower = self->blocks[place].block;
	upper = self->blocks[place + 1].block;
	if (lower->count + upper->count > ROWS_PER_BLOCK / 2)
		return;
	memcpy(&lower->rows[lower->count], upper->rows,
	       upper->count * sizeof(*upper->rows));
	lower->count += upper->count;
	index_remove_block(self, place + 1);
}

/* Returns false, with an exception, if it is no address. */
static int parse(PyObject *object, uint64_t *address)
{
	*address = PyLong_AsUnsignedLongLong(object);
	return *address != UINT64_MAX || !PyErr_Occurred();
}

static PyObject *index_covering_method(PyObject *object, PyObject *arguments)
{
	unsigned long long start, end;
	struct entry *entry;

	if (!PyArg_ParseTuple(arguments, "KK", &start, &end))
		return NULL;
	entry = index_covering((struct index *)object, start, end);
	return Py_NewRef(entry ? (PyObject *)entry : Py_None);
}

/* Returns those that lie within a range, or all of them. */
static PyObject *index_within(PyObject *object, PyObject *arguments)
{
	const struct index *self = (struct index *)object;
	unsigned long long start = 0, end = UINT64_MAX;
	Py_ssize_t place, row;
	PyObject *list;

	if (!PyArg_ParseTuple(arguments, "|KK", &start, &end))
		return NULL;
	list = PyList_New(0);
	for (place = index_search(self, start); list && place < self->block_count;
	     place++) {
		const struct block *block = self->blocks[place].block;

		row = start ? rows_search(block->rows, block->count, start - 1) : 0;
		for (; row < block->count; row++) {
			struct entry *entry = block->rows[row].entry;

			if (entry->end > end)
				return list;
			if (PyList_Append(list, (PyObject *)entry)) {
				Py_DECREF(list);
				return NULL;
			}
		}
	}
	return list;
}

static struct entry *checked_entry(PyTypeObject *defining_class,
				   PyObject *const *arguments, Py_ssize_t count,
				   PyObject *names)
{
	const struct state *state = PyType_GetModuleState(defining_class);

	if (count == 1 && !names && PyObject_TypeCheck(arguments[0], state->entry_type))
		return (struct entry *)arguments[0];
	PyErr_SetString(PyExc_TypeError, "it takes an entry");
	return NULL;
}

static PyObject *index_insert(PyObject *object, PyTypeObject *defining_class,
			      PyObject *const *arguments, Py_ssize_t count,
			      PyObject *names)
{
	struct index *self = (struct index *)object;
	struct entry *entry = checked_entry(defining_class, arguments, count, names);
	struct block *block;
	Py_ssize_t place;

	if (!entry || (!self->count && !index_add_block(self, 0, entry->start)))
		return NULL;
	place = index_search(self, entry->start);
	if (self->blocks[place].block->count == ROWS_PER_BLOCK) {
		if (!index_split(self, place))
			return NULL;
		place = index_search(self, entry->start);
	}
	block = self->blocks[place].block;
	rows_insert(block->rows, &block->count,
		    rows_search(block->rows, block->count, entry->start),
		    (struct row){ .start = entry->start, .entry = entry });
	Py_INCREF((PyObject *)entry);
	self->blocks[place].start = block->rows[0].start;
	self->count++;
	Py_RETURN_NONE;
}

static PyObject *index_remove(PyObject *object, PyTypeObject *defining_class,
			      PyObject *const *arguments, Py_ssize_t count,
			      PyObject *names)
{
	struct index *self = (struct index *)object;
	struct entry *entry = checked_entry(defining_class, arguments, count, names);
	struct block *block = NULL;
	Py_ssize_t place, row = -1;

	if (!entry)
		return NULL;
	place = index_search(self, entry->start);
	if (self->count) {
		block = self->blocks[place].block;
		row = rows_search(block->rows, block->count, entry->start) - 1;
	}
	if (row < 0 || block->rows[row].entry != entry) {
		PyErr_SetString(PyExc_KeyError, "no such entry");
		return NULL;
	}
	rows_remove(block->rows, &block->count, row);
	self->count--;
	if (block->count) {
		self->blocks[place].start = block->rows[0].start;
		index_join(self, place);
		index_join(self, place - 1);
	} else {
		index_remove_block(self, place);
	}
	Py_DECREF((PyObject *)entry);
	Py_RETURN_NONE;
}

static PyObject *index_get(PyObject *object, PyTypeObject *defining_class,
			   PyObject *const *arguments, Py_ssize_t count,
			   PyObject *names)
{
	const struct state *state = PyType_GetModuleState(defining_class);
	struct use *use;

	if (count == 1 && !names)
		return PyObject_CallMethod(object, "_get_buffer", "(O)", arguments[0]);
	if (count != 2 || names) {
		PyErr_SetString(PyExc_TypeError,
				"get() takes a buffer, or a start and an end");
		return NULL;
	}
	use = (struct use *)PyType_GenericAlloc(state->use_type, 0);
	if (use) {
		use->index = (struct index *)Py_NewRef(object);
		use->start = Py_NewRef(arguments[0]);
		use->end = Py_NewRef(arguments[1]);
	}
	return (PyObject *)use;
}

static int index_traverse(PyObject *object, visitproc visit, void *arg)
{
	struct index *self = (struct index *)object;
	Py_ssize_t place, row;

	Py_VISIT(Py_TYPE(object));
	for (place = 0; place < self->block_count; place++)
		for (row = 0; row < self->blocks[place].block->count; row++)
			Py_VISIT(self->blocks[place].block->rows[row].entry);
	return 0;
}

static int index_clear(PyObject *object)
{
	struct index *self = (struct index *)object;
	struct row *blocks = self->blocks;
	Py_ssize_t place, row, count = self->block_count;

	/* Giving up an entry can run any code, which is to find none. */
	self->blocks = NULL;
	self->block_count = self->room = self->count = 0;
	for (place = 0; place < count; place++) {
		for (row = 0; row < blocks[place].block->count; row++)
			Py_DECREF((PyObject *)blocks[place].block->rows[row].entry);
		PyMem_Free(blocks[place].block);
	}
	PyMem_Free(blocks);
	return 0;
}

static void index_dealloc(PyObject *object)
{
	PyObject_GC_UnTrack(object);
	index_clear(object);
	release(object);
}

#define METHOD(function) ((PyCFunction)(void (*)(void))(function))

static PyMethodDef index_methods[] = {
	{ "get", METHOD(index_get), METH_METHOD | METH_FASTCALL | METH_KEYWORDS,
	  PyDoc_STR("get(buffer) or get(start, end)\n\n"
		    "Return an asynchronous context manager for one use of a "
		    "registration.\n\n"
		    "Addresses are those of the first byte, and of that behind the last "
		    "one. Raises\nInvalidBufferError; entering it raises "
		    "InvalidRangeError, UnstableMemoryError,\nProcessGoneError, "
		    "ClosedError, ForkedError.") },
	{ "_covering", index_covering_method, METH_VARARGS, NULL },
	{ "_within", index_within, METH_VARARGS, NULL },
	{ "_insert", METHOD(index_insert), METH_METHOD | METH_FASTCALL | METH_KEYWORDS,
	  NULL },
	{ "_remove", METHOD(index_remove), METH_METHOD | METH_FASTCALL | METH_KEYWORDS,
	  NULL },
	{ NULL, NULL, 0, NULL },
};

static PyMemberDef index_members[] = {
	{ "_count", T_PYSSIZET, offsetof(struct index, count), READONLY, NULL },
	{ "_is_pending", T_BOOL, offsetof(struct index, is_pending), 0, NULL },
	{ NULL, 0, 0, 0, NULL },
};

static PyType_Slot index_slots[] = {
	{ Py_tp_methods, index_methods },
	{ Py_tp_members, index_members },
	{ Py_tp_traverse, index_traverse },
	{ Py_tp_clear, index_clear },
	{ Py_tp_dealloc, index_dealloc },
	{ 0, NULL },
};

static PyType_Spec index_spec = {
	.name = "aioummu._hits.Index",
	.basicsize = sizeof(struct index),
	.flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_BASETYPE | Py_TPFLAGS_HAVE_GC,
	.slots = index_slots,
};

/* Uses. */

/* Returns the entry to use, if there is one and nothing else is to be done. */
static struct entry *use_find(const struct use *self)
{
	uint64_t start, end;
	struct entry *entry;
	int is_settled;

	if (!PyLong_Check(self->start) || !PyLong_Check(self->end))
		return NULL;
	/* Whoever looks closer says what is wrong with it. */
	if (!parse(self->start, &start) || !parse(self->end, &end)) {
		PyErr_Clear();
		return NULL;
	}
	if (start >= end)
		return NULL;
	entry = index_covering(self->index, start, end);
	if (!entry || !entry->is_simple)
		return NULL;
	/* Loading can run any code. */
	Py_INCREF((PyObject *)entry);
	is_settled = entry_is_settled(entry);
	if (is_settled == 1 && entry->is_simple)
		return entry;
	Py_DECREF((PyObject *)entry);
	return NULL;
}

static void use_begin(struct use *self, struct entry *entry)
{
	self->entry = (struct entry *)Py_NewRef((PyObject *)entry);
	entry->users++;
	entry->stamp = ++self->index->clock;
}

static PyObject *use_enter(PyObject *object, PyObject *unused)
{
	struct use *self = (struct use *)object;
	struct entry *entry;

	(void)unused;
	if (self->entry) {
		PyErr_SetString(PyExc_RuntimeError,
				"this use was entered already: call get() for another");
		return NULL;
	}
	entry = use_find(self);
	if (!entry) {
		if (PyErr_Occurred())
			return NULL;
		return PyObject_CallMethod((PyObject *)self->index, "_enter", "OOO",
					   object, self->start, self->end);
	}
	entry->hits++;
	use_begin(self, entry);
	Py_DECREF((PyObject *)entry);
	return Py_NewRef(object);
}

static PyObject *use_exit(PyObject *object, PyTypeObject *defining_class,
			  PyObject *const *arguments, Py_ssize_t count,
			  PyObject *names)
{
	struct use *self = (struct use *)object;
	struct entry *entry = self->entry;
	PyObject *result;

	(void)arguments;
	(void)count;
	(void)names;
	if (!entry) {
		PyErr_SetString(PyExc_RuntimeError, "this use was not entered");
		return NULL;
	}
	self->entry = NULL;
	entry->users--;
	entry->stamp = ++self->index->clock;
	if (entry->is_simple && !self->index->is_pending) {
		const struct state *state = PyType_GetModuleState(defining_class);

		result = Py_NewRef(state->done);
	} else {
		result = PyObject_CallMethod((PyObject *)self->index, "_left", "(O)",
					     (PyObject *)entry);
	}
	Py_DECREF((PyObject *)entry);
	return result;
}

/* use._take(entry): it is used by the one who enters it. */
static PyObject *use_take(PyObject *object, PyTypeObject *defining_class,
			  PyObject *const *arguments, Py_ssize_t count,
			  PyObject *names)
{
	struct use *self = (struct use *)object;
	struct entry *entry = checked_entry(defining_class, arguments, count, names);

	if (!entry)
		return NULL;
	if (self->entry) {
		PyErr_SetString(PyExc_RuntimeError,
				"this use was entered already: call get() for another");
		return NULL;
	}
	use_begin(self, entry);
	Py_RETURN_NONE;
}

static int use_traverse(PyObject *object, visitproc visit, void *arg)
{
	struct use *self = (struct use *)object;

	Py_VISIT(Py_TYPE(object));
	Py_VISIT(self->index);
	Py_VISIT(self->start);
	Py_VISIT(self->end);
	Py_VISIT(self->entry);
	return 0;
}

static int use_clear(PyObject *object)
{
	struct use *self = (struct use *)object;

	Py_CLEAR(self->index);
	Py_CLEAR(self->start);
	Py_CLEAR(self->end);
	Py_CLEAR(self->entry);
	return 0;
}

static void use_dealloc(PyObject *object)
{
	PyObject_GC_UnTrack(object);
	use_clear(object);
	release(object);
}

static PyObject *use_registration(PyObject *object)
{
	struct entry *entry = ((struct use *)object)->entry;

	return entry ? entry->registration : NULL;
}

static PySendResult use_send(PyObject *object, PyObject *unused, PyObject **result)
{
	(void)unused;
	return give(use_registration(object), result);
}

static PyObject *use_next(PyObject *object)
{
	return give_by_exception(use_registration(object));
}

static PyMethodDef use_methods[] = {
	{ "__aenter__", use_enter, METH_NOARGS, NULL },
	{ "__aexit__", METHOD(use_exit), METH_METHOD | METH_FASTCALL | METH_KEYWORDS,
	  NULL },
	{ "_take", METHOD(use_take), METH_METHOD | METH_FASTCALL | METH_KEYWORDS, NULL },
	{ NULL, NULL, 0, NULL },
};

static PyType_Slot use_slots[] = {
	{ Py_tp_methods, use_methods },
	{ Py_tp_traverse, use_traverse },
	{ Py_tp_clear, use_clear },
	{ Py_tp_dealloc, use_dealloc },
	{ Py_tp_iter, PyObject_SelfIter },
	{ Py_tp_iternext, use_next },
	{ Py_am_await, PyObject_SelfIter },
	{ Py_am_send, use_send },
	{ 0, NULL },
};

static PyType_Spec use_spec = {
	.name = "aioummu._hits.Use",
	.basicsize = sizeof(struct use),
	.flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC |
		 Py_TPFLAGS_DISALLOW_INSTANTIATION,
	.slots = use_slots,
};

/* The module. */

static PyTypeObject *add_type(PyObject *module, PyType_Spec *spec)
{
	PyObject *type = PyType_FromModuleAndSpec(module, spec, NULL);

	if (type && PyModule_AddType(module, (PyTypeObject *)type))
		Py_CLEAR(type);
	return (PyTypeObject *)type;
}

static int module_exec(PyObject *module)
{
	struct state *state = PyModule_GetState(module);
	PyTypeObject *type;

	type = add_type(module, &done_spec);
	if (!type)
		return -1;
	state->done = PyObject_CallNoArgs((PyObject *)type);
	Py_DECREF((PyObject *)type);
	type = add_type(module, &index_spec);
	if (!type)
		return -1;
	Py_DECREF((PyObject *)type);
	state->entry_type = add_type(module, &entry_spec);
	state->use_type = add_type(module, &use_spec);
	return state->done && state->entry_type && state->use_type ? 0 : -1;
}

static int module_traverse(PyObject *module, visitproc visit, void *arg)
{
	struct state *state = PyModule_GetState(module);

	Py_VISIT(state->done);
	Py_VISIT(state->entry_type);
	Py_VISIT(state->use_type);
	return 0;
}

static int module_clear(PyObject *module)
{
	struct state *state = PyModule_GetState(module);

	Py_CLEAR(state->done);
	Py_CLEAR(state->entry_type);
	Py_CLEAR(state->use_type);
	return 0;
}

static PyModuleDef_Slot module_slots[] = {
	{ Py_mod_exec, module_exec },
	{ 0, NULL },
};

static struct PyModuleDef module_definition = {
	PyModuleDef_HEAD_INIT,
	.m_name = "_hits",
	.m_size = sizeof(struct state),
	.m_slots = module_slots,
	.m_traverse = module_traverse,
	.m_clear = module_clear,
};

PyMODINIT_FUNC PyInit__hits(void)
{
	return PyModuleDef_Init(&module_definition);
}
