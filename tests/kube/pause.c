/* What holds a pod's namespaces in the tests: it reaps and waits to be told to end. */
#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

static void end(int signal) {
  (void)signal;
  _exit(0);
}

int main(void) {
  signal(SIGTERM, end);
  signal(SIGINT, end);
  for (;;) {
    while (waitpid(-1, 0, WNOHANG) > 0) {
    }
    sleep(1);
  }
}
