/* SPDX-License-Identifier: LGPL-2.1-or-later
 *
 * The words of the settings that users name.  A table's first word for a value is the one we
 * print; further ones are spellings that QEMU takes too.
 */
#include <oxbow/types.h>
#include "base/base.h"
#include <string.h>

struct word {
	const char *word;
	int value;
};

static const struct word cache_words[] = {
        {"none", OX_CACHE_NONE},
        {"writeback", OX_CACHE_WRITEBACK},
        {"writethrough", OX_CACHE_WRITETHROUGH},
        {"directsync", OX_CACHE_DIRECTSYNC},
        {"unsafe", OX_CACHE_UNSAFE},
        {"off", OX_CACHE_NONE},
};

static const struct word aio_words[] = {
        {"auto", OX_AIO_AUTO},     {"sync", OX_AIO_SYNC},         {"threads", OX_AIO_THREADS},
        {"native", OX_AIO_NATIVE}, {"io_uring", OX_AIO_IO_URING},
};

static const struct word on_error_words[] = {
        {"report", OX_ON_ERROR_REPORT},
        {"ignore", OX_ON_ERROR_IGNORE},
        {"stop", OX_ON_ERROR_STOP},
        {"enospc", OX_ON_ERROR_ENOSPC},
};

static const struct word discard_words[] = {
        {"unmap", OX_DISCARD_UNMAP},
        {"ignore", OX_DISCARD_IGNORE},
        {"on", OX_DISCARD_UNMAP},
        {"off", OX_DISCARD_IGNORE},
};

static const struct word detect_zeroes_words[] = {
        {"off", OX_DETECT_ZEROES_OFF},
        {"on", OX_DETECT_ZEROES_ON},
        {"unmap", OX_DETECT_ZEROES_UNMAP},
};

static const struct word preallocation_words[] = {
        {"off", OX_PREALLOC_OFF},
        {"falloc", OX_PREALLOC_FALLOC},
        {"full", OX_PREALLOC_FULL},
};

static const char *name_of(const struct word *words, size_t count, int value)
{
	for (size_t i = 0; i < count; i++)
		if (words[i].value == value)
			return words[i].word;
	return NULL;
}

static const struct word *find(const struct word *words, size_t count, const char *word)
{
	for (size_t i = 0; i < count; i++)
		if (!strcmp(words[i].word, word))
			return &words[i];
	return NULL;
}

#define OX_DEFINE_WORDS(what)                                                                     \
	const char *ox_##what##_name(enum ox_##what value)                                        \
	{                                                                                         \
		return name_of(what##_words, OX_ARRAY_SIZE(what##_words), (int)value);            \
	}                                                                                         \
	bool ox_##what##_parse(const char *word, enum ox_##what *out)                             \
	{                                                                                         \
		const struct word *found = find(what##_words, OX_ARRAY_SIZE(what##_words), word); \
                                                                                                  \
		if (found)                                                                        \
			*out = (enum ox_##what)found->value;                                      \
		return found != NULL;                                                             \
	}

OX_DEFINE_WORDS(cache)
OX_DEFINE_WORDS(aio)
OX_DEFINE_WORDS(on_error)
OX_DEFINE_WORDS(discard)
OX_DEFINE_WORDS(detect_zeroes)
OX_DEFINE_WORDS(preallocation)
