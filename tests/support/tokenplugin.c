/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * A token plugin of libcryptsetup for tests.  Its token says in the JSON what it does:
 *
 *   "passphrase"  what it gives, every byte exclusive-or 0x5a, as hexadecimal digits
 *   "pin"         in the same way: the PIN that it wants
 *   "errno"       a number: what it fails with
 *   "attempt"     what it tries first: "read:PATH", "write:PATH", "execute:PATH", "fork" or "socket".  Then it fails
 *                 with the errno value that came of it, or EXFULL if it succeeded.
 *
 * Its type is what its file is called: libcryptsetup-token-TYPE.so.
 */
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>
#include <libcryptsetup.h>

#define MASK 0x5a

int cryptsetup_token_open_pin(struct crypt_device *cd, int token, const char *pin, size_t pin_size, char **password,
			      size_t *password_length, void *user);
int cryptsetup_token_open(struct crypt_device *cd, int token, char **password, size_t *password_length, void *user);
void cryptsetup_token_buffer_free(void *buffer, size_t length);
const char *cryptsetup_token_version(void);

const char *cryptsetup_token_version(void)
{
	return "1";
}

static const char *member(const char *json, const char *name)
{
	char wanted[64];

	/* libcryptsetup hands out its JSON without spaces */
	snprintf(wanted, sizeof(wanted), "\"%s\":", name);
	json = strstr(json, wanted);
	return json ? json + strlen(wanted) : NULL;
}

static char *decoded(const char *text, size_t *length)
{
	size_t digits = strspn(++text, "0123456789abcdef");
	char *bytes = malloc(digits / 2 + 1);
	unsigned int byte;

	if (!bytes)
		return NULL;
	for (*length = 0; *length < digits / 2; ++*length) {
		sscanf(text + 2 * *length, "%2x", &byte);
		bytes[*length] = (char)(byte ^ MASK);
	}
	return bytes;
}

static int attempted(const char *text)
{
	char what[4096], *path, *const none[] = { NULL };
	int result = -1;

	snprintf(what, sizeof(what), "%.*s", (int)strcspn(text + 1, "\""), text + 1);
	path = strchr(what, ':');
	if (path)
		*path++ = '\0';
	errno = EINVAL;
	if (path && !strcmp(what, "read"))
		result = open(path, O_RDONLY);
	else if (path && !strcmp(what, "write"))
		result = open(path, O_WRONLY);
	else if (path && !strcmp(what, "execute"))
		result = execve(path, none, none);
	else if (!strcmp(what, "socket"))
		result = socket(AF_UNIX, SOCK_DGRAM, 0);
	else if (!strcmp(what, "fork")) {
		result = fork();
		if (result == 0)
			_exit(0);
	}
	return result < 0 ? -errno : -EXFULL;
}

int cryptsetup_token_open_pin(struct crypt_device *cd, int token, const char *pin, size_t pin_size, char **password,
			      size_t *password_length, void *user)
{
	const char *json, *found;
	char *wanted;
	size_t length;
	int same;

	(void)user;
	if (crypt_token_json_get(cd, token, &json) < 0)
		return -EINVAL;
	found = member(json, "attempt");
	if (found)
		return attempted(found);
	found = member(json, "errno");
	if (found) {
		crypt_log(cd, CRYPT_LOG_ERROR, "The test plugin fails, as it was told.\n");
		return -atoi(found);
	}
	found = member(json, "pin");
	if (found) {
		wanted = decoded(found, &length);
		same = wanted && pin && pin_size == length && !memcmp(wanted, pin, length);
		if (wanted)
			cryptsetup_token_buffer_free(wanted, length);
		if (!same)
			return -ENOANO;
	}
	found = member(json, "passphrase");
	*password = found ? decoded(found, password_length) : NULL;
	return *password ? 0 : -EINVAL;
}

int cryptsetup_token_open(struct crypt_device *cd, int token, char **password, size_t *password_length, void *user)
{
	return cryptsetup_token_open_pin(cd, token, NULL, 0, password, password_length, user);
}

void cryptsetup_token_buffer_free(void *buffer, size_t length)
{
	explicit_bzero(buffer, length);
	free(buffer);
}
